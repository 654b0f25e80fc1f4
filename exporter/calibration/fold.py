"""Find factors that even out the inputs of matrices, because one scale rounds a whole row of them to 8 bits.

Inputs are divided by a power of their largest magnitude in texts, channel by channel, as in SmoothQuant (Xiao et al.
2022, arXiv:2211.10438) but for its look at the weights.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from exporter.calibration.layer_by_layer import LayerByLayer
from exporter.checkpoint.folding import folding_sites, readers_of
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.parts import GraphParts, fitted_width, graph_parts, sample_rows
from exporter.quantization.numbers import Scales, lies_on_grid
from exporter.quantization.recipes import RECIPES
from exporter.texts.token_texts import TokenTexts
from runtime_ref.manifest import Progress

# Power of the magnitudes by the least bits of the matrices. A higher one evens out more, and spreads the sizes of
# columns, which 4 bits bear worse than 8.
POWERS = {4: 0.25, 8: 0.5}
MIN_RATIO = 2**-10  # to the largest of all; channels that are smaller are hardly used
MAX_TOKENS = 1024  # that the largest magnitudes are taken from


def foldable(part: GraphParts) -> dict[str, float]:
    """Return the weights of a target that factors are folded into, and the power of magnitudes that is evened out.

    Args:
        part: the target under a recipe. Only where matrices are rounded, and none lies on a grid, which factors for its
            columns would break.
    """
    sites = {}
    for name in folding_sites(part.weights):
        readers = readers_of(name, part.weights)
        rounded = [reader for reader in readers if reader in part.widths]
        if any(isinstance(part.weights[weight], IntegerReader) for weight in (name, *readers)):
            continue  # the checkpoint's integers stay as they are
        if rounded and not any(_on_grid(part, reader) for reader in rounded):
            sites[name] = POWERS[min(part.widths[reader].bits for reader in rounded)]
    return sites


def _on_grid(part: GraphParts, name: str) -> bool:
    rows = sample_rows(next(row_blocks(part.weights[name])))
    return lies_on_grid(rows, fitted_width(part, name))


@torch.no_grad()
def fold(pair: Pair, sites: Mapping[str, float], texts: TokenTexts, progress: Progress = lambda *_: None) -> Pair:
    """Return the same target with factors folded into its weights: what it computes stays the same.

    Args:
        pair: the target and its drafter.
        sites: what `foldable` returned.
        texts: token ids, of which about `MAX_TOKENS` are run.
        progress: called with the name of each layer.

    Raises:
        InputError: the texts lead to numbers that are not finite.
    """
    model = LayerByLayer(pair, graph_parts(pair, RECIPES["fp32"])["target"])
    passes = model.begin(_some(texts), None, RECIPES["fp32"], Scales())
    exponents: dict[str, Tensor] = {}
    for i in range(model.num_layers):
        names = model.layer_weights(i)
        model.load(names)
        first = {readers_of(site, pair.target_weights)[0]: site for site in sites if site in names}
        largest = model.largest_inputs(first, partial(model.run_layer, i, passes))
        exponents |= {site: _exponents(largest[name], sites[site]) for name, site in first.items()}
        model.drop_kv(i, passes)
        model.unload(names)
        progress(f"layer {i}", 0)
    return pair.with_folding({site: found for site, found in exponents.items() if found.any()})


def _some(texts: TokenTexts) -> list[tuple[int, ...]]:
    """Every nth text, so that all kinds are among them; the last that fits is cut."""
    chosen, left = [], MAX_TOKENS
    for text in texts.texts[:: max(1, texts.num_tokens // MAX_TOKENS)]:
        if left > 0:
            chosen.append(text[:left])
            left -= len(text)
    return chosen


def _exponents(largest: Tensor, power: float) -> Tensor:
    """Exponents [channels] int8 of factors that are 1 on average, from the largest magnitudes [channels]."""
    logs = power * largest.clamp(min=max(MIN_RATIO * float(largest.max()), torch.finfo(torch.float32).tiny)).log2()
    return (logs - logs.mean()).round().to(torch.int8)
