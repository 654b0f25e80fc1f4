"""Low-bit integers: a matrix as symmetric integers, where the numbers of a group along a row share a scale."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.quantization.widths import QAT_GROUP_SIZE, Width


@dataclass(frozen=True)
class Scales:
    """Which scales a backend can store; those of 8-bit integers are always positive.

    Attributes:
        dtype: type that a scale is rounded to.
        negative: whether a scale may be negative.
    """

    dtype: torch.dtype = torch.float32
    negative: bool = True

    def holds(self, scales: Tensor) -> Tensor:
        """Return which scales of less than 8 bits are stored without a change, as bool of the same shape."""
        return (scales == scales.to(self.dtype).float()) & ((scales > 0) | self.negative)


@dataclass(frozen=True)
class Quantized:
    """A matrix [rows, columns] as integers and scales; G is the number of groups in a row.

    Attributes:
        numbers: [rows, columns] int8, in [-2^(bits-1), 2^(bits-1)).
        scales: [rows, G] float32, one for each group of columns/G numbers.
        bits: bits of a number.
    """

    numbers: Tensor
    scales: Tensor
    bits: int

    @property
    def group_size(self) -> int:
        """How many numbers share a scale."""
        return self.numbers.shape[1] // self.scales.shape[1]

    @classmethod
    def join(cls, blocks: Iterable["Tensor | Quantized"]) -> "Quantized":
        """Concatenate blocks of rows of one matrix; blocks that are not quantized are left out."""
        parts = [block for block in blocks if isinstance(block, Quantized)]
        return cls(torch.cat([p.numbers for p in parts]), torch.cat([p.scales for p in parts]), parts[0].bits)

    @classmethod
    def gather(cls, blocks: "Iterable[Quantized]", rows: int) -> "Quantized":
        """Put blocks of rows, in all so many, into one matrix; memory holds no more than one block twice."""
        whole, start = None, 0
        for block in blocks:
            if whole is None:
                of_rows = block.numbers.shape[1], block.scales.shape[1]
                whole = cls(torch.empty(rows, of_rows[0], dtype=torch.int8), torch.empty(rows, of_rows[1]), block.bits)
            stop = start + len(block.numbers)
            whole.numbers[start:stop], whole.scales[start:stop] = block.numbers, block.scales
            start = stop
        assert whole is not None and start == rows
        return whole

    def held_as(self, width: Width) -> "Quantized":
        """Return the same numbers in as many bits or more, and groups as small or smaller; no value changes."""
        repeats, rest = divmod(self.group_size, width.group_size or self.group_size)
        assert repeats and not rest, (self.group_size, width)
        return Quantized(self.numbers, self.scales.repeat_interleave(repeats, 1), width.bits)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids [..] int64 as [.., columns] float32."""
        return Quantized(self.numbers[ids], self.scales[ids], self.bits).dequantize()

    def dequantize(self) -> Tensor:
        """Return the matrix [rows, columns] float32, integer times scale, with which every backend computes."""
        rows, columns = self.numbers.shape
        return (self.numbers.view(rows, -1, self.group_size) * self.scales.unsqueeze(2)).view(rows, columns)


def quantize(weight: Tensor, width: Width, allowed: Scales = Scales()) -> Quantized:
    """Round a matrix to integers; of the scales that are tried, each group takes the one with the least squared error.

    A matrix that was quantized before, to as many bits and in the same groups, is reproduced without error if its
    scales are allowed: as soon as some groups are, every integer that the largest number of a group may have been is
    tried for all of them.

    Args:
        weight: [rows, columns] float32.
        width: bits of an integer, 8 or fewer, and a group size that divides the columns.
        allowed: which scales may be chosen.
    """
    group_size = width.group_size or weight.shape[1]
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // group_size)
    step = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for start in range(0, len(weight), step):
        groups = weight[start : start + step].reshape(-1, group_size)
        scale = best_scales(groups, width.bits, allowed)
        if width.bits <= 4:
            scale = _giving_bfloat16(groups, scale, width.bits, allowed)
        numbers[start : start + step] = _round(groups, scale, width.bits).view(-1, weight.shape[1])
        scales[start : start + step] = scale.view(-1, weight.shape[1] // group_size)
    return Quantized(numbers, scales, width.bits)


def best_scales(groups: Tensor, bits: int, allowed: Scales, importance: Tensor | None = None) -> Tensor:
    """Return the scale with the least squared error, of those that are tried, for each group of numbers.

    Args:
        groups: [groups, group size] float32.
        bits: bits of an integer.
        allowed: which scales may be chosen.
        importance: [group size] float32, what a squared error in each place counts; None for the same in all.

    Returns:
        [groups, 1] float32.
    """
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # the number of the largest magnitude, signed
    if bits == 8:
        allowed = replace(allowed, negative=False)
    best, best_error = torch.ones_like(extreme), torch.full_like(extreme, torch.inf)

    def attempt(integer: float) -> None:
        """Try the scales with which the largest numbers become this integer."""
        nonlocal best, best_error
        scale = extreme / integer if allowed.negative else extreme.abs() / abs(integer)
        scale = scale.to(allowed.dtype).float()
        scale[scale == 0] = 1.0
        difference = _round(groups, scale, bits).mul_(scale).sub_(groups)
        if importance is not None:
            difference.mul_(importance.sqrt())
        error = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        best, best_error = torch.where(error < best_error, scale, best), torch.minimum(error, best_error)

    for integer in _EXTREME_INTEGERS.get(bits, (2 ** (bits - 1) - 1,)):
        attempt(integer)
    if bits in _EXTREME_INTEGERS and ((best_error <= 1e-6 * extreme.abs()) & (extreme != 0)).any():
        for integer in range(1, 2 ** (bits - 1) - 1):
            attempt(integer)
    return best


def _giving_bfloat16(groups: Tensor, scale: Tensor, bits: int, allowed: Scales) -> Tensor:
    """Replace the scales of groups on a grid by ones whose products, rounded to bfloat16, are the groups' numbers.

    So are those of the scale that training used, from which rounding has moved the best one. A group whose numbers are
    no bfloat16, or for which no such scale is found, keeps its own.
    """
    numbers = _round(groups, scale, bits)
    error = (numbers * scale - groups).abs().amax(1, keepdim=True)
    near = (error > 0) & (error <= GRID_ROUNDING * groups.abs().amax(1, keepdim=True))
    chosen = near & (groups.bfloat16() == groups).all(1, keepdim=True)
    if not (rows := chosen.squeeze(1).nonzero().squeeze(1)).numel():
        return scale
    groups, numbers, old = groups[rows], numbers[rows], scale[rows]
    magnitudes, integers = groups.abs(), numbers.abs()
    # Half the distance between neighbours: bfloat16 has 8 bits, and below a power of two one more.
    power = magnitudes.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    below, above = torch.where(magnitudes == power, 2**-9, 2**-8) * power, 2**-8 * power
    low = ((magnitudes - below) / integers.clamp(min=1)).amax(1, keepdim=True)
    high = 1 / (integers / (magnitudes + above).clamp(min=torch.finfo(torch.float32).tiny)).amax(1, keepdim=True)
    new = ((low + high) / 2 * old.sign()).to(allowed.dtype).float()
    exact = ((numbers * new).bfloat16() == groups).all(1, keepdim=True)
    scale = scale.clone()
    scale[rows] = torch.where(exact, new, old)
    return scale


def _round(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (groups / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# Of the largest number of a group. Rounding to bfloat16 moved numbers on a grid of 4 bits, and the scale that fits them
# best, by at most 0.006 of it together; rounding normally distributed numbers to 4 bits moves some by at least 0.05.
GRID_ROUNDING = 2**-7
_EXACT = 2**-18  # likewise, of rounding to float32

_BLOCK_NUMBERS = 1 << 17  # quantized at a time, so that they stay in a core's cache

# Integers to try for a group's largest number, by bits. Those out of range are clamped, which lowers the error of a
# group whose largest number is an outlier; there, fractions serve as well as integers.
_EXTREME_INTEGERS: dict[int, tuple[float, ...]] = {
    4: (-8, 7, -9, -10, -11),
    3: (-4, 3, -4.5, -5, -5.5),
    2: (-2, 1, 1.5, -2.5, -3),
}


def fitting_width(width: Width, rows: Tensor) -> Width:
    """Choose the group size for a matrix: that of `width`, or 32 (`QAT_GROUP_SIZE`) where the matrix asks for it.

    It does if the group size does not divide the columns, or if the rows lie on a grid of groups of 32 but on none of
    the groups of `width`. Widths of more than 4 bits are returned as they are.

    Args:
        width: bits and the preferred group size.
        rows: [sampled rows, columns] float32, some rows of the matrix.
    """
    if width.bits > 4:
        return width
    fine = Width(width.bits, QAT_GROUP_SIZE)
    if width.group_size is not None and rows.shape[1] % width.group_size:
        return fine
    return fine if lies_on_grid(rows, fine) and not lies_on_grid(rows, width) else width


def lies_on_grid(rows: Tensor, width: Width) -> bool:
    """Return whether integers of a width, with a scale for each group, give the rows but for rounding to bfloat16.

    Checkpoints of quantization-aware training are stored in bfloat16, which rounds most products of integer and scale.

    Args:
        rows: [rows, columns] float32.
        width: bits of an integer, and a group size that divides the columns. Of more than 4 bits only grids in float32
            are known: rounding to bfloat16 moves others by as much as any matrix is from the nearest grid.
    """
    allowed = GRID_ROUNDING if width.bits <= 4 else _EXACT
    quantized = quantize(rows, width)
    error, groups = (x.reshape(len(rows), -1, quantized.group_size) for x in (quantized.dequantize() - rows, rows))
    return bool((error.abs().amax(2) <= allowed * groups.abs().amax(2)).all())


def pack(numbers: Tensor, bits: int) -> np.ndarray:
    """Pack integers into bytes, as FORMAT.md describes it.

    Args:
        numbers: [rows, columns] int8, in [-2^(bits-1), 2^(bits-1)).
        bits: bits of a number, 1 to 8.

    Returns:
        [rows, columns*bits/8, rounded up] uint8: 2^(bits-1) is added to each number, and each row is a little-endian
        stream of bits.
    """
    unsigned = (numbers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned.numpy()
    if bits in (2, 4):  # the same bytes as below, in a tenth of the time
        per_byte = 8 // bits
        first, *others = F.pad(unsigned, (0, -unsigned.shape[1] % per_byte)).view(len(unsigned), -1, per_byte).unbind(2)
        for i, other in enumerate(others, 1):
            first = first | other << bits * i
        return first.numpy()
    planes = (unsigned.unsqueeze(2) >> torch.arange(bits, dtype=torch.uint8)) & 1
    return np.packbits(planes.flatten(1).numpy(), axis=1, bitorder="little")


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack` for integers of which a byte holds a whole number.

    Args:
        packed: [rows, bytes] uint8.
        bits: bits of a number, 2, 4 or 8.
        columns: numbers in a row; what follows them is ignored.

    Returns:
        [rows, columns] int8.
    """
    parts = [(packed >> shift & 2**bits - 1) for shift in range(0, 8, bits)]
    return (torch.stack(parts, 2).view(len(packed), -1)[:, :columns].to(torch.int8)) - 2 ** (bits - 1)


def quantize_clusters(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize embedding rows, with a scale for each, to the layout that `exporter.modeling.two_stage` reads.

    Args:
        rows: [..., E] float32, E even.
        bits: 8 or 4.

    Returns:
        The integers and the scales [...] float32. Integers of 8 bits are [..., E] int8. Those of 4 bits are [..., E/2]
        int8: number i of a row, plus 8, is in the lower half of byte i, number E/2 + i in the upper half.
    """
    quantized = quantize(rows.reshape(-1, rows.shape[-1]), Width(bits))
    numbers, scales = quantized.numbers.view(rows.shape), quantized.scales.view(rows.shape[:-1])
    if bits == 8:
        return numbers, scales
    low, high = numbers.chunk(2, dim=-1)
    return 16 * high + low + 8, scales
