"""Decide when a difference counts: the thresholds of `exporter.doctor.diagnosis`, each with its reason."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exporter.parity.tolerance import EAGER_FACTOR, MAX_TOLERANCE

PASS, FINDING, SKIPPED = "pass", "finding", "skipped"

# Smallest tolerance of an error, relative to a row's length: float32 sums in another order. It is ten times what parity
# allows of an output's largest number, since a row may be short.
MIN_TOLERANCE = 1e-3

# A variant must accept this much more of the drafts, as a fraction, on the same text: a smaller gain does not explain a
# low acceptance.
MIN_GAIN = 0.05

# The gain must also be this many standard errors over texts. A dozen variants are tried on a dozen texts: with 3 one
# healthy pair in ten would have a finding by chance (Student's t), with 4 one in fifty.
MIN_STANDARD_ERRORS = 4
MIN_TEXTS = 5  # below which a standard error over texts means nothing

# A fault is judged by rows that it moves further than rounding does. In them the bundle fits the fault if its distance
# from the fault is below this fraction of its distance from the correct values. The same fraction decides whether a
# fault moves rows far enough to be distinguished from the bundle's own rounding.
CLOSER_FACTOR = 0.5**0.5


@dataclass(frozen=True)
class Experiment:
    """One row of the doctor's table.

    Attributes:
        experiment: its name.
        verdict: `PASS`, `FINDING` or `SKIPPED`.
        detail: the measurements in a sentence.
        figures: the same measurements, by name.
    """

    experiment: str
    verdict: str
    detail: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """Which of several variants the bundle's values are closest to.

    All distances are between rows, relative to the length of the correct row.

    Attributes:
        best: name of the closest variant; None if the bundle fits none better than the correct values.
        tolerance: largest `error` that rounding explains.
        error: distance of the bundle from the correct values, as a root mean square over rows.
        best_error: distance of the bundle from the best variant, as a root mean square over rows; infinite if there is
            none.
        effects: for each variant, over the rows that it changes, the median distance of the variant from the correct
            values, and of the bundle from the correct values. Variants that change nothing are missing.
    """

    best: str | None
    tolerance: float
    error: float
    best_error: float
    effects: dict[str, tuple[float, float]]

    def is_visible(self, name: str) -> bool:
        """Return whether a variant, which must be in `effects`, differs by more than rounding."""
        effect, rounding = self.effects[name]
        return effect >= CLOSER_FACTOR * rounding


def best_fit(actual: Tensor, correct: Tensor, variants: Mapping[str, Tensor], tolerance: float) -> Fit:
    """Compare the bundle's values with the correct ones and with each variant.

    A variant is judged by the median of the rows that it changes: where activations are rounded a few rows are far off.

    Args:
        actual: [rows, E] float, the bundle's values.
        correct: [rows, E] float, eager torch's values.
        variants: [rows, E] float, eager torch's values with a fault, by the fault's name.
        tolerance: largest error of the bundle that rounding explains.
    """
    errors = relative_distances(actual, correct, correct)
    error, best, best_error = root_mean_square(errors), None, math.inf
    effects = {}
    for name, variant in variants.items():
        moved = relative_distances(variant, correct, correct)
        remaining = relative_distances(actual, variant, correct)
        changed = moved > 1e-6
        if not changed.any():
            continue
        effect, away, closer = (float(part[changed].median()) for part in (moved, errors, remaining))
        effects[name] = (effect, away)
        is_near = closer < CLOSER_FACTOR * away and closer <= max(tolerance, away / 3)
        if effect >= CLOSER_FACTOR * away and is_near and root_mean_square(remaining) < best_error:
            best, best_error = name, root_mean_square(remaining)
    return Fit(best, tolerance, error, best_error, effects)


def relative_distances(a: Tensor, b: Tensor, correct: Tensor) -> Tensor:
    """Return the distances [rows] between the rows of `a` and `b`, over the lengths of the rows of `correct`.

    Args:
        a: [rows, E] float.
        b: [rows, E] float.
        correct: [rows, E] float.
    """
    return (a - b).norm(dim=1) / correct.norm(dim=1).clamp(min=1e-30)


def error_tolerance(rounding_error: float) -> float:
    """Return the largest relative error allowed of a bundle, given the error of rounding activations in eager torch."""
    return min(max(MIN_TOLERANCE, EAGER_FACTOR * rounding_error), MAX_TOLERANCE)


def acceptance_gain(baseline: Sequence[Tensor], variant: Sequence[Tensor], steps: int) -> tuple[float, float]:
    """Return how much more of the drafts a variant accepts.

    Rounds of one text resemble each other, so the standard error is over texts, not over rounds.

    Args:
        baseline: for each text, accepted drafts of each round, [rounds] int64.
        variant: the same for the variant, on the same rounds.
        steps: drafts in a round.

    Returns:
        The difference of the acceptance rates, and its standard error.
    """
    counts = torch.tensor([float(len(rounds)) for rounds in baseline])
    sums = torch.stack([(b - a).sum() for a, b in zip(baseline, variant, strict=True)]).double() / steps
    gain, texts = float(sums.sum() / counts.sum()), len(counts)
    spread = ((sums - gain * counts) ** 2).sum() * texts / max(texts - 1, 1)
    return gain, float(spread.sqrt() / counts.sum())


def is_clear_gain(gain: float, standard_error: float, texts: int) -> bool:
    """Return whether a gain in acceptance, measured on so many texts, is large and not chance."""
    return texts >= MIN_TEXTS and gain > MIN_GAIN and gain > MIN_STANDARD_ERRORS * standard_error


def narrower_dtype(rows: Iterable[Tensor]) -> str | None:
    """Return the 16-bit float type that holds every number of some float32 tensors exactly, or None.

    Numbers that were computed in float32 do not fit one by chance.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if all(part.any() and part.to(dtype).float().equal(part) for part in rows):
            return str(dtype).removeprefix("torch.")
    return None


def root_mean_square(errors: Tensor) -> float:
    """Return the root mean square of a float tensor."""
    return float(errors.square().mean().sqrt())
