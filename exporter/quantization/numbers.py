"""Numbers of few bits: symmetric integers in groups along a row, each group with a scale."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Width:
    """Bits of a number, and how many numbers of a row share a scale (None: all of them)."""

    bits: int
    group: int | None = None


@dataclass(frozen=True)
class Scales:
    """What scales can be; those of 8 bits are always positive."""

    dtype: torch.dtype = torch.float32
    negative: bool = True


FLOAT = Width(32)
QAT_GROUP = 32  # of checkpoints trained for llama.cpp's Q4_0


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] as integers, int8 in [-2^(bits-1), 2^(bits-1)), and scales [N, K/group] in float32."""

    numbers: Tensor
    scales: Tensor
    bits: int

    @property
    def group(self) -> int:
        return self.numbers.shape[1] // self.scales.shape[1]

    @classmethod
    def join(cls, blocks: Iterable["Tensor | Quantized"]) -> "Quantized":
        """One matrix of its blocks of rows."""
        found = [block for block in blocks if isinstance(block, Quantized)]
        return cls(torch.cat([b.numbers for b in found]), torch.cat([b.scales for b in found]), found[0].bits)

    def dequantize(self) -> Tensor:
        """The matrix in float32: integer times scale, exactly what every backend multiplies by."""
        rows, columns = self.numbers.shape
        return (self.numbers.view(rows, -1, self.group) * self.scales.unsqueeze(2)).view(rows, columns)


def quantize(weight: Tensor, width: Width, kind: Scales = Scales()) -> Quantized:
    """Round a matrix [N, K] to integers; of several scales each group takes the one with the least squared error.

    What lies on a grid of so many bits comes out on it, with no error at all if its scales can be of that kind: where
    some groups are met exactly, every scale on whose grid a group's largest number can lie is tried for all.
    `width.group` must divide K.
    """
    group = width.group or weight.shape[1]
    numbers, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), weight.shape[1] // group)
    step = max(1, _BLOCK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].reshape(-1, group)
        scale = _best_scales(rows, width.bits, kind)
        numbers[start : start + step] = _round(rows, scale, width.bits).view(-1, weight.shape[1])
        scales[start : start + step] = scale.view(-1, weight.shape[1] // group)
    return Quantized(numbers, scales, width.bits)


def _best_scales(groups: Tensor, bits: int, kind: Scales) -> Tensor:
    """A scale [G, 1] for each of the groups [G, group]."""
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    if bits == 8:
        kind = replace(kind, negative=False)
    best, least = torch.ones_like(extreme), torch.full_like(extreme, torch.inf)

    def attempt(place: float) -> None:
        nonlocal best, least
        scale = extreme / place if kind.negative else extreme.abs() / abs(place)
        scale = scale.to(kind.dtype).float()
        scale[scale == 0] = 1.0
        off = _round(groups, scale, bits).mul_(scale).sub_(groups)
        error = torch.linalg.vector_norm(off, dim=1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)

    for place in _PLACES.get(bits, (2 ** (bits - 1) - 1,)):
        attempt(place)
    if bits in _PLACES and ((least <= 1e-6 * extreme.abs()) & (extreme != 0)).any():
        for place in range(1, 2 ** (bits - 1) - 1):
            attempt(place)
    return best


def _round(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (groups / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


_BLOCK = 1 << 17  # numbers at a time, so that they stay in a core's cache

# What a group's largest number may become; beyond the range it is cut off, which pays where it stands out.
_PLACES: dict[int, tuple[float, ...]] = {
    4: (-8, 7, -9, -10, -11),
    3: (-4, 3, -4.5, -5, -5.5),
    2: (-2, 1, 1.5, -2.5, -3),
}


def fitting_width(width: Width, rows: Tensor) -> Width:
    """The width with groups as they suit a matrix, of which some rows [N, K] are given.

    They are of 32 numbers where K has no larger ones, or where the rows lie on such a grid but on no coarser one.
    """
    if width.bits > 4:
        return width
    fine = Width(width.bits, QAT_GROUP)
    if width.group is not None and rows.shape[1] % width.group:
        return fine
    on_fine, on_coarse = (torch.equal(quantize(rows, w).dequantize(), rows) for w in (fine, width))
    return fine if on_fine and not on_coarse else width


def pack(numbers: Tensor, bits: int) -> np.ndarray:
    """Integers [N, K] as unsigned numbers, 2^(bits-1) added, each row a little-endian stream of bits [N, K*bits/8]."""
    unsigned = (numbers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned.numpy()
    if bits == 4:  # as below, but ten times as fast
        even, odd = F.pad(unsigned, (0, unsigned.shape[1] % 2)).view(len(unsigned), -1, 2).unbind(2)
        return (even | odd << 4).numpy()
    planes = (unsigned.unsqueeze(2) >> torch.arange(bits, dtype=torch.uint8)) & 1
    return np.packbits(planes.flatten(1).numpy(), axis=1, bitorder="little")


def quantize_clusters(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows [.., E], E even, as symmetric integers of 8 or 4 bits, and each row's scale: a number is integer * scale.

    Returns:
        int8 [.., E] and float32 [..]. With 4 bits, int8 [.., E/2]: number i of a row, plus 8, in the lower half of
        byte i, number E/2 + i in the upper half, as `exporter.modeling.two_stage` reads them.
    """
    quantized = quantize(rows.reshape(-1, rows.shape[-1]), Width(bits))
    numbers, scales = quantized.numbers.view(rows.shape), quantized.scales.view(rows.shape[:-1])
    if bits == 8:
        return numbers, scales
    first, second = numbers.chunk(2, dim=-1)
    return 16 * second + first + 8, scales
