"""Calibrate a target: run texts through it layer by layer, and round each matrix by the inputs that it meets."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from exporter.calibration.fold import fold, foldable
from exporter.calibration.layer_by_layer import PROJECTION, LayerByLayer
from exporter.calibration.steps import Steps, key_of
from exporter.checkpoint.pair import Calibrated, Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.grids import off_grid
from exporter.graphs.parts import GraphParts, graph_parts
from exporter.quantization.numbers import Quantized, Scales
from exporter.quantization.recipes import Recipe
from exporter.quantization.second_order import Inputs, part_columns, quantize_for
from exporter.quantization.widths import Width
from exporter.texts.token_texts import TokenTexts
from runtime_ref.manifest import Progress


def calibrate(
    pair: Pair,
    recipe: Recipe,
    allowed: Scales,
    texts: TokenTexts,
    directory: Path,
    progress: Progress = lambda *_: None,
) -> Pair:
    """Fold factors into the target, and round its matrices of 4 bits that lie on no grid so that texts change least.

    First `exporter.calibration.fold` evens out what runtimes round to 8 bits. Then, layer by layer: the texts run
    through the layer in float32 on what the rounded layers before it give, its matrices are rounded, and the texts run
    through the rounded layer.

    Args:
        pair: the target and its drafter.
        recipe: how many bits each matrix is stored in.
        allowed: which scales the backend can store.
        texts: token ids.
        directory: where finished steps are kept; the pair that is returned reads from it.
        progress: called with the name of each matrix and its bytes in float32.

    Returns:
        The same pair, folded, with the integers and scales of these matrices in the place of their floats; as it was if
        there is nothing to do.

    Raises:
        InputError: the texts lead to numbers that are not finite.
    """
    part = graph_parts(pair, recipe)["target"]
    widths, sites = off_grid(part), foldable(part)
    if sites:
        pair = fold(pair, sites, texts, progress)
        part = graph_parts(pair, recipe)["target"]
    elif not widths:
        return pair
    found = _rounded(pair, recipe, part, widths, allowed, texts, directory, progress) if widths else {}
    if not found and not pair.folding:
        return pair
    calibrated = Calibrated(texts.source, texts.sha256, texts.num_tokens, torch.get_num_threads(), tuple(sorted(found)))
    return replace(pair, target_weights={**pair.target_weights, **found}, calibrated=calibrated)


def few_tokens_warning(part: GraphParts, widths: dict[str, Width], texts: TokenTexts) -> str | None:
    """Return a warning if texts have fewer tokens than the matrices of `widths` have columns, else None."""
    columns = max((part_columns(part.shapes[name][1], width.group_size) for name, width in widths.items()), default=0)
    if texts.num_tokens >= columns:
        return None
    return (
        f"{texts.source}: {texts.num_tokens} tokens are few to calibrate matrices with {columns} columns on, and"
        " rounding to the nearest may be better; give more text than columns"
    )


def _rounded(
    pair: Pair,
    recipe: Recipe,
    part: GraphParts,
    widths: dict[str, Width],
    allowed: Scales,
    texts: TokenTexts,
    directory: Path,
    progress: Progress,
) -> dict[str, IntegerReader]:
    """Round the matrices of `widths`; the other arguments are those of `calibrate`."""
    key = {"recipe": [recipe.name, recipe.toml()], "texts": texts.sha256}
    steps = Steps.open(directory, key_of(pair, allowed) | key)
    found: dict[str, IntegerReader] = {}
    with torch.no_grad():
        run = _Run(pair, recipe, part, widths, allowed, steps, progress)
        for step, names in run.steps(texts):
            found |= {
                name: IntegerReader(partial(steps.blocks, step, name), widths[name], part.shapes[name][1])
                for name in names
            }
    return found


class _Run:
    """A calibration of one target."""

    def __init__(
        self,
        pair: Pair,
        recipe: Recipe,
        part: GraphParts,
        widths: dict[str, Width],
        allowed: Scales,
        done: Steps,
        progress: Progress,
    ) -> None:
        self.recipe, self.part, self.widths = recipe, part, widths
        self.allowed, self.done, self.progress = allowed, done, progress
        self.model = LayerByLayer(pair, part)

    def steps(self, texts: TokenTexts) -> Iterator[tuple[str, list[str]]]:
        """Yield the name of each step and its calibrated matrices, once they are written."""
        model = self.model
        begin = partial(model.begin, texts.texts, None, self.recipe, self.allowed)
        yield "projection", self._step("projection", [PROJECTION], partial(model.inputs, run=begin))
        passes = begin()
        for i in range(model.num_layers):
            names = model.layer_weights(i)
            model.load(names)
            collect = partial(model.inputs, run=partial(model.run_layer, i, passes, False))
            yield f"layer-{i}", self._step(f"layer-{i}", names, collect)
            model.run_layer(i, passes)
            model.drop_kv(i, passes)
            model.unload(names)
        collect = partial(model.inputs, run=partial(model.collect_states, passes))
        yield "embedding", self._step("embedding", [model.pair.head], collect)

    def _step(self, step: str, names: list[str], collect: Callable[[dict[str, Width]], dict[str, Inputs]]) -> list[str]:
        """Round the matrices of a step, unless an earlier run did, and give the module their rounded values."""
        wanted = {name: self.widths[name] for name in names if name in self.widths}
        rounded = self.done.read(step) if wanted else {}
        if rounded is None:
            inputs = collect(wanted)
            rounded = {name: self._round(name, width, inputs[name]) for name, width in wanted.items()}
            self.done.write(step, rounded)
        else:
            self.progress(step, sum(4 * matrix.numbers.numel() for matrix in rounded.values()))
        if step != "embedding":  # no text runs through the head
            for name in names:
                if name in self.part.widths:
                    matrix = rounded[name] if name in rounded else self.part.whole(name, self.allowed)
                    assert isinstance(matrix, Quantized)
                    self.model.put(name, matrix.dequantize())
        return list(rounded)

    def _round(self, name: str, width: Width, inputs: Inputs) -> Quantized:
        def blocks() -> Iterator[Quantized]:
            for block in row_blocks(self.part.weights[name]):
                yield quantize_for(block, inputs, width, self.allowed)
                self.progress(name, 4 * block.numel())

        return Quantized.gather(blocks(), self.part.shapes[name][0])
