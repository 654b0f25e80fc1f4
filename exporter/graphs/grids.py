"""Whether a pair's weights lie on a grid of 4 bits, as quantization-aware training leaves them."""

from collections.abc import Mapping

from torch import Tensor

from exporter.checkpoint.tensors import row_blocks
from exporter.graphs.parts import GraphParts
from exporter.quantization.numbers import fitting_width, lies_on_grid
from exporter.quantization.widths import Width

GRID_BITS = 4
SAMPLE_ROWS = 8  # of each matrix


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
    rounded = [name for part, name in matrices if not _fits(_sample(part, name), part.widths[name])]
    if not rounded:
        return []
    share = len(rounded) / len(matrices)
    return [
        f"recipe {recipe}: {len(rounded)} of {len(matrices)} matrices in 4 bits ({share:.0%}, such as {rounded[0]}) lie"
        " on no grid of 4 bits, so rounding changes what the model says; `parity` measures how much, and checkpoints"
        " that were trained for 4 bits (QAT) lose far less"
    ]


def _fits(rows: Tensor, width: Width) -> bool:
    return lies_on_grid(rows, fitting_width(width, rows))


def _sample(part: GraphParts, name: str) -> Tensor:
    block = next(iter(row_blocks(part.weights[name])))
    return block[:: max(1, len(block) // SAMPLE_ROWS)][:SAMPLE_ROWS].contiguous()
