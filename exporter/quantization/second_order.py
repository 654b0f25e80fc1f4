"""Round a matrix so that its products with typical inputs change least, instead of each number for itself.

The error of a row w that is rounded to v is (w - v)' G (w - v), where G is the sum of x x' over inputs x of calibration
texts. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds column by column and spreads each error over the columns that
follow. Then scales and integers are improved in turn: the scales of a row by least squares, the integers by coordinate
descent (QuantEase, Behdin et al. 2023, arXiv:2309.01885).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.quantization.numbers import Quantized, Scales, best_scales, quantize
from exporter.quantization.widths import Width

DAMPING = 0.01  # of the mean of G's diagonal, added to it, as in GPTQ
ROUNDS = 1  # of scales and integers in turn; a second lowers the error by a hundredth
MAX_COLUMNS = 4096  # of one G; wider matrices are rounded in parts, because the work grows with the cube of the columns
_BLOCK_COLUMNS = 128  # whose errors are spread at once over all columns that follow
BLOCK_ROWS = 4096  # that are rounded at a time, which bounds memory


@dataclass(frozen=True)
class Inputs:
    """The inputs that a matrix is multiplied with, as the sums of their products.

    Attributes:
        parts: for each part of the columns, where it begins and G [columns of the part, columns of the part] float32,
            damped; the parts have equal sizes.
        factors: for each part the upper Cholesky factor of G's inverse, float32.
    """

    parts: tuple[tuple[int, Tensor], ...]
    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, grams: list[Tensor]) -> "Inputs":
        """Prepare the sums of x x' of each part of the columns, each [columns of the part, columns of the part]."""
        parts, factors, start = [], [], 0
        for gram in grams:
            gram = gram.clone()
            diagonal = gram.diagonal()
            diagonal.add_(DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny))
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
            factors.append(torch.linalg.cholesky(inverse, upper=True).float())
            parts.append((start, gram))
            start += len(gram)
        return cls(tuple(parts), tuple(factors))


def part_columns(columns: int, group_size: int | None) -> int:
    """Return how many columns of a matrix share one G: all, or an equal part of whole groups.

    Args:
        columns: columns of the matrix.
        group_size: how many numbers of a row share a scale; None for the whole row.
    """
    for count in range(1, columns + 1):
        size, rest = divmod(columns, count)
        if rest == 0 and size <= MAX_COLUMNS and (group_size is None or size % group_size == 0):
            return size
    return columns


def add_products(grams: list[Tensor], x: Tensor) -> None:
    """Add the products of inputs x [T, columns] float32 to the sums x x' of each part of the columns, in place."""
    start = 0
    for gram in grams:
        part = x[:, start : start + len(gram)]
        gram.addmm_(part.T, part)
        start += len(gram)


def quantize_for(weight: Tensor, inputs: Inputs, width: Width, allowed: Scales = Scales()) -> Quantized:
    """Round a matrix to integers so that its products with the inputs change least.

    A row keeps what `quantize` gives it if that is no worse, so a row that lies on a grid is reproduced.

    Args:
        weight: [rows, columns] float32.
        inputs: what the matrix is multiplied with.
        width: bits of an integer, less than 8, and a group size that divides the columns.
        allowed: which scales may be chosen.
    """
    blocks = []
    for rows in weight.split(BLOCK_ROWS):
        nearest = quantize(rows, width, allowed)
        numbers, scales = _tuned(rows, inputs, nearest, allowed)
        tuned = Quantized(numbers.to(torch.int8), scales, width.bits)
        better = (_errors(rows, tuned, inputs) < _errors(rows, nearest, inputs)).unsqueeze(1)
        blocks.append(
            Quantized(
                torch.where(better, tuned.numbers, nearest.numbers),
                torch.where(better, tuned.scales, nearest.scales),
                width.bits,
            )
        )
    return Quantized.join(blocks)


def _errors(weight: Tensor, rounded: Quantized, inputs: Inputs) -> Tensor:
    """The error [rows] that a rounded matrix makes on the inputs."""
    difference = weight - rounded.dequantize()
    error = torch.zeros(len(weight))
    for start, gram in inputs.parts:
        part = difference[:, start : start + len(gram)]
        error += ((part @ gram) * part).sum(1)
    return error


def _tuned(weight: Tensor, inputs: Inputs, nearest: Quantized, allowed: Scales) -> tuple[Tensor, Tensor]:
    """Integers [rows, columns] float32 and scales [rows, G] of every part of the columns.

    Where a whole row shares one scale, its parts share the one that `quantize` chose, and the last part cannot move it.
    """
    bits, group_size, whole = nearest.bits, nearest.group_size, nearest.scales.shape[1] == 1
    fixed = nearest.scales.T.contiguous() if whole and len(inputs.parts) > 1 else None
    numbers, scales = [], []
    for (start, gram), factor in zip(inputs.parts, inputs.factors, strict=True):
        part = weight[:, start : start + len(gram)].T.contiguous()  # columns first: they are what is worked through
        size = len(gram) if whole else group_size
        integers, scale = _spread(part, factor, size, bits, allowed, fixed)
        for _ in range(ROUNDS):
            if fixed is None:
                scale = _fitted_scales(part, integers, scale, gram, bits, allowed)
            integers = _descend(part, integers, scale, gram, bits)
        numbers.append(integers.T)
        scales.append(scale.T)
    return torch.cat(numbers, 1), scales[0] if whole else torch.cat(scales, 1)


def _spread(
    weight: Tensor, factor: Tensor, group_size: int, bits: int, allowed: Scales, fixed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """GPTQ: integers [columns, rows] float32 and scales [G, rows] of a matrix [columns, rows]."""
    weight, columns = weight.clone(), len(weight)
    numbers, scales = torch.empty_like(weight), []
    importance = factor.diagonal() ** -2  # how much an error in a column costs that later columns cannot make up for
    block = _block_columns(group_size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(stop - start, weight.shape[1])
        for column in range(start, stop):
            if column % group_size == 0:
                group = slice(column, column + group_size)
                scales.append(
                    best_scales(weight[group].T.contiguous(), bits, allowed, importance[group])[:, 0]
                    if fixed is None
                    else fixed[0]
                )
            scale = scales[-1]
            numbers[column] = _to_integers(weight[column], scale, bits)
            error = (weight[column] - numbers[column] * scale) / factor[column, column]
            errors[column - start] = error
            weight[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return numbers, torch.stack(scales)


def _block_columns(group_size: int) -> int:
    """Columns of a block: groups begin at the start of a block or end within one."""
    if group_size <= 2 * _BLOCK_COLUMNS:
        return group_size * max(1, _BLOCK_COLUMNS // group_size)
    return next((size for size in (_BLOCK_COLUMNS, 64, 32) if group_size % size == 0), group_size)


def _fitted_scales(weight: Tensor, numbers: Tensor, scales: Tensor, gram: Tensor, bits: int, allowed: Scales) -> Tensor:
    """Scales [G, rows] with the least error for given integers [columns, rows], by least squares in each row."""
    groups, rows = scales.shape
    by_group = numbers.view(groups, -1, rows)
    size = by_group.shape[1]
    products = torch.empty(rows, groups, groups, dtype=torch.float64)
    for group in range(groups):
        spread = gram[:, group * size : (group + 1) * size] @ by_group[group]
        products[:, :, group] = (numbers * spread).view(groups, size, rows).sum(1).T
    wanted = (numbers * (gram @ weight)).view(groups, size, rows).sum(1).T.double()
    diagonal = products.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    solved = torch.linalg.solve(products, wanted).T.to(allowed.dtype).float()
    usable = solved.isfinite() & (solved != 0 if allowed.negative else solved > 0)
    return torch.where(usable & (by_group != 0).any(1), solved, scales)


def _descend(weight: Tensor, numbers: Tensor, scales: Tensor, gram: Tensor, bits: int) -> Tensor:
    """Integers [columns, rows] after one sweep in which each column takes what is best for it, given all others."""
    numbers, size = numbers.clone(), len(weight) // len(scales)
    slopes = gram @ (weight - numbers * scales.repeat_interleave(size, 0))
    for start in range(0, len(weight), _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, len(weight))
        within, changes = slopes[start:stop].clone(), torch.empty(stop - start, weight.shape[1])
        for column in range(start, stop):
            scale, at = scales[column // size], column - start
            best = _to_integers(numbers[column] * scale + within[at] / gram[column, column], scale, bits)
            changes[at] = (best - numbers[column]) * scale
            numbers[column] = best
            within[at + 1 :].addr_(gram[column, column + 1 : stop], changes[at], alpha=-1)
        slopes.addmm_(gram[:, start:stop], changes, alpha=-1)
    return numbers


def _to_integers(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (values / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
