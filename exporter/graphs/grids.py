"""Whether a pair's weights lie on a grid of 4 bits, as quantization-aware training leaves them."""

from collections.abc import Mapping

from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.parts import GraphParts, sample_rows
from exporter.quantization.numbers import fitting_width, lies_on_grid
from exporter.quantization.widths import Width

GRID_BITS = 4


def off_grid(part: GraphParts) -> dict[str, Width]:
    """Return the matrices of a graph that are stored in 4 bits and lie on no such grid, with the width of each.

    Args:
        part: the graph's module and weights. Integers of the checkpoint stay as they are.
    """
    found = {}
    for name, width in part.widths.items():
        read = part.weights.get(name)
        if width.bits == GRID_BITS and read is not None and not isinstance(read, IntegerReader):
            rows = sample_rows(next(row_blocks(read)))
            fitting = fitting_width(width, rows)
            if not lies_on_grid(rows, fitting):
                found[name] = fitting
    return found


def grid_warnings(parts: Mapping[str, GraphParts], recipe: str, calibrated: bool = False) -> list[str]:
    """Return a line if a recipe rounds matrices to the nearest 4 bits that lie on no such grid.

    Args:
        parts: what each graph consists of, by graph name.
        recipe: name of the recipe, for the message.
        calibrated: whether those of the target are calibrated, so that only the drafter's are rounded to the nearest.
    """
    judged = {name: part for name, part in parts.items() if not (calibrated and name == "target")}
    rounded = [name for part in judged.values() for name in off_grid(part)]
    if not rounded:
        return []
    total = sum(part.widths[name].bits == GRID_BITS for part in judged.values() for name in part.widths)
    share = f"{len(rounded)} of {total} matrices in 4 bits ({len(rounded) / total:.0%}, such as {rounded[0]})"
    if calibrated:
        return [
            f"recipe {recipe}: {share} of the drafter lie on no grid of 4 bits and are rounded to the nearest, so fewer"
            " drafts may be accepted; no token changes"
        ]
    return [
        f"recipe {recipe}: {share} lie on no grid of 4 bits, so rounding changes what the model says; `parity` measures"
        " how much, and checkpoints that were trained for 4 bits (QAT) lose far less"
    ]
