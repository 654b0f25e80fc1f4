"""Whether a pair's weights lie on a grid of 4 bits, as quantization-aware training leaves them."""

from collections.abc import Mapping

from exporter.checkpoint.tensors import row_blocks
from exporter.graphs.parts import GraphParts, sample_rows
from exporter.quantization.numbers import fitting_width, lies_on_grid

GRID_BITS = 4


def grid_warnings(parts: Mapping[str, GraphParts], recipe: str) -> list[str]:
    """Return a line if a recipe rounds matrices to 4 bits that lie on no such grid.

    Args:
        parts: what each graph consists of, by graph name.
        recipe: name of the recipe, for the message.
    """
    matrices = [
        (part, name)
        for part in parts.values()
        for name, width in part.widths.items()
        if width.bits == GRID_BITS and name in part.weights
    ]
    rounded = [name for part, name in matrices if not _fits(part, name)]
    if not rounded:
        return []
    share = len(rounded) / len(matrices)
    return [
        f"recipe {recipe}: {len(rounded)} of {len(matrices)} matrices in 4 bits ({share:.0%}, such as {rounded[0]}) lie"
        " on no grid of 4 bits, so rounding changes what the model says; `parity` measures how much, and checkpoints"
        " that were trained for 4 bits (QAT) lose far less"
    ]


def _fits(part: GraphParts, name: str) -> bool:
    rows = sample_rows(next(row_blocks(part.weights[name])))
    return lies_on_grid(rows, fitting_width(part.widths[name], rows))
