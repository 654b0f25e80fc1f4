"""How many bits a matrix is stored in; without torch, for what only names recipes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any


@dataclass(frozen=True)
class Width:
    """How a matrix is stored.

    Attributes:
        bits: bits of a number; 32 for float32.
        group_size: how many numbers of a row share a scale; None for the whole row.
    """

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f" in groups of {self.group_size}" if self.group_size is not None else "")


FLOAT = Width(32)
QAT_GROUP_SIZE = 32  # of checkpoints that were trained for llama.cpp's Q4_0

# What both runtimes multiply with, what clusters of a drafter's head have, and what a table of rows can hold.
WIDTHS = (Width(2), Width(4), Width(4, 32), Width(4, 64), Width(4, 128), Width(8), FLOAT)
WIDTHS_OF_CLUSTERS = (Width(4), Width(8), FLOAT)
BITS_OF_TABLE = (Width(2), Width(3), Width(4), Width(4, 32), Width(8), FLOAT)


def by_width(widths: Mapping[str, Width]) -> list[dict[str, Any]]:
    """Return the manifest's `widths`: how matrices are stored that are not float32, by their names in recipes."""
    return [
        {**asdict(width), "matrices": sorted(name for name, other in widths.items() if other == width)}
        for width in sorted(set(widths.values()), key=lambda width: (width.bits, width.group_size or 0))
    ]


def held(stored: Width, asked: Width, columns: int) -> Width | None:
    """Return the width in which integers are stored without a change where a recipe asks for another width.

    Args:
        stored: the integers' own.
        asked: the recipe's.
        columns: how many numbers share a scale where a width has no group size.

    Returns:
        The recipe's bits, in groups that divide those of both; None if these are too few bits.
    """
    if stored.bits > asked.bits:
        return None
    if asked == FLOAT:
        return asked
    size = gcd(stored.group_size or columns, asked.group_size or columns)
    return Width(asked.bits, None if size == columns else size)
