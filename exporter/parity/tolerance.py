"""How far a graph's outputs may be from the reference's, and how that is measured."""

import torch
from torch import Tensor

from exporter.modeling.target import is_suppressed

# Largest error allowed against the recipe's weights in float64, relative to the largest magnitude of that output (or
# 1): same weights, same formulas, only the order of float32 sums differs.
TOLERANCE = 1e-4

# A deep or badly conditioned model amplifies rounding past any fixed bound, in eager torch as in a bundle: the rounding
# of float32 sums, and of the 8-bit activations of quantized layers. So a bundle's error may also be this many times the
# error of eager torch with the same rounding, both against float64; on a random pair of E4B's depth it was 1.0 to 1.5.
EAGER_FACTOR = 4

# No tolerance exceeds this: an output of all zeros has an error of 1, and a model that rounding disturbs so much cannot
# be judged.
MAX_TOLERANCE = 0.5


def tolerance_for(eager_error: float) -> float:
    """Return the largest relative error that an output may have.

    Args:
        eager_error: the error of eager torch with the same weights and rounding, against float64.
    """
    return min(max(TOLERANCE, EAGER_FACTOR * eager_error), MAX_TOLERANCE)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest magnitude of the exact values, or to 1 if that is smaller.

    Args:
        actual: values of any shape; logits of suppressed tokens must stand where they do in `exact`.
        exact: float64, of the same shape.
    """
    suppressed = is_suppressed(exact)
    if not torch.equal(is_suppressed(actual), suppressed):
        return float("inf")
    actual, exact = actual.masked_fill(suppressed, 0), exact.masked_fill(suppressed, 0)
    scale = max(1.0, float(exact.abs().max()))
    return float((actual.double() - exact).abs().max()) / scale
