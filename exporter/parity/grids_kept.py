"""Count the groups of numbers on a grid of few bits that a bundle has exactly as the checkpoint does."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeGuard

from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import TensorReader
from exporter.graphs.grids import GRID_BITS
from exporter.graphs.parts import graph_parts, sample_rows
from exporter.graphs.tables import outside_tables
from exporter.parity.checks import Check
from exporter.quantization.numbers import Scales, fitting_width, lies_on_grid, quantize
from exporter.quantization.recipes import Recipe
from exporter.quantization.widths import Width


def grids_check(pair: Pair, recipe: Recipe, scales: Scales) -> Check | None:
    """Return how many groups of bfloat16 numbers on a grid come out of the bundle as they are, once rounded likewise.

    Nothing is judged: a backend's scales may be too coarse for some, or not negative.

    Args:
        pair: the checkpoints.
        recipe: how their weights are stored.
        scales: dtype and signs that the backend has for scales of 4-bit weights.

    Returns:
        None if no matrix of the recipe's few bits lies on a grid.
    """
    matrices = groups = lost = 0
    for read, width, store in _stored(pair, recipe, scales):
        rows = sample_rows(next(read.blocks()))
        size = width.group_size or rows.shape[1]
        if not lies_on_grid(rows.reshape(-1, size), Width(width.bits)):
            continue
        matrices += 1
        for block in read.blocks():
            wrong = (store(block).bfloat16() != block.bfloat16()).reshape(-1, size).any(1)
            groups, lost = groups + len(wrong), lost + int(wrong.sum())
    if not matrices:
        return None
    return Check("weights", "groups on a grid", True, detail=f"{groups - lost} of {groups} kept, {matrices} matrices")


def _stored(
    pair: Pair, recipe: Recipe, scales: Scales
) -> Iterator[tuple[TensorReader, Width, Callable[[Tensor], Tensor]]]:
    """Readers of bfloat16 matrices in few bits, how each is stored, and what becomes of a block of its rows."""
    for part in graph_parts(pair, recipe).values():
        for name, width in part.widths.items():
            read = part.weights.get(name)
            if width.bits <= GRID_BITS and _is_bfloat16(read):
                fitting = fitting_width(width, sample_rows(next(read.blocks())))
                yield read, fitting, partial(_rounded, fitting, scales)
    for table in outside_tables(pair, recipe).values():
        if table.width.bits <= GRID_BITS and _is_bfloat16(table.read):
            yield table.read, Width(table.width.bits, table.group_size), table.stored


def _rounded(width: Width, scales: Scales, block: Tensor) -> Tensor:
    return quantize(block, width, scales).dequantize()


def _is_bfloat16(read: object) -> TypeGuard[TensorReader]:
    return isinstance(read, TensorReader) and read.checkpoint.entries[read.name].dtype == "BF16"
