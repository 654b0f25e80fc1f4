"""How many bits a matrix is stored in; without torch, for what only names recipes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Width:
    """How a matrix is stored.

    Attributes:
        bits: bits of a number; 32 for float32.
        group_size: how many numbers of a row share a scale; None for the whole row.
    """

    bits: int
    group_size: int | None = None


FLOAT = Width(32)
QAT_GROUP_SIZE = 32  # of checkpoints that were trained for llama.cpp's Q4_0
