"""Quantization: matrices on a grid are reproduced, packing follows FORMAT.md, recipes set the width of each part."""

import numpy as np
import pytest
import torch

from exporter.quantization.numbers import Scales, fitting_width, pack, quantize
from exporter.quantization.numbers import unpack as unpack_torch
from exporter.quantization.recipes import RECIPES, stored_widths
from exporter.quantization.widths import FLOAT, Width, held
from runtime_ref.tables import unpack

XNNPACK = Scales(torch.bfloat16, negative=False)


def grid(bits: int, group_size: int) -> torch.Tensor:
    """A matrix [48, 256] of integers times float16 scales of either sign; not every group uses its whole range."""
    rows, columns = 48, 256
    generator = torch.Generator().manual_seed(bits + group_size)
    shape = (rows, columns // group_size, group_size)
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator)
    numbers[::3] //= 2
    numbers[5] = 0
    scales = torch.randn(rows, columns // group_size, 1, generator=generator).half().float()
    return (numbers * scales).view(rows, columns)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (4, 256), (3, 64), (2, 32)])
def test_what_lies_on_a_grid_comes_out_on_it(bits: int, group_size: int) -> None:
    """A matrix on a grid is reproduced without error, as in checkpoints that were trained for Q4_0."""
    weight = grid(bits, group_size)
    assert torch.equal(quantize(weight, Width(bits, group_size)).dequantize(), weight)


def test_xnnpacks_scales_are_positive_and_bfloat16() -> None:
    """XNNPACK refuses other scales. A matrix on a grid with positive bfloat16 scales is reproduced without error."""
    weight = grid(4, 32)
    quantized = quantize(weight, Width(4, 32), XNNPACK)
    assert (quantized.scales > 0).all()
    assert torch.equal(quantized.scales.bfloat16().float(), quantized.scales)
    positive = (quantized.numbers.view(48, -1, 32) * quantized.scales.unsqueeze(2)).view(48, -1)
    assert torch.equal(quantize(positive, Width(4, 32), XNNPACK).dequantize(), positive)


def test_group_size_is_that_of_the_grid() -> None:
    """Groups have 128 numbers, but 32 where the matrix lies on a grid of 32 or its columns do not divide by 128."""
    preferred = Width(4, 128)
    assert fitting_width(preferred, grid(4, 32)) == Width(4, 32)
    assert fitting_width(preferred, grid(4, 128)) == preferred
    assert fitting_width(preferred, torch.randn(8, 256, generator=torch.Generator().manual_seed(0))) == preferred
    assert fitting_width(preferred, torch.ones(8, 96)) == Width(4, 32)
    assert fitting_width(Width(4), grid(4, 32)) == Width(4, 32)
    assert fitting_width(Width(8), torch.ones(8, 60)) == Width(8)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_no_scale_near_the_chosen_one_is_better(bits: int) -> None:
    """The error of random groups is within a few percent of that of the best scale in a fine scan."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    error = (quantize(weight, Width(bits)).dequantize() - weight).norm()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = torch.full((64,), torch.inf)
    for factor in torch.linspace(0.2, 1.2, 200):
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1)) * factor * 2
        rounded = (weight / scale).round().clamp(low, high) * scale
        best = torch.minimum(best, (rounded - weight).norm(dim=1))
    assert error < best.norm() * {8: 1.05, 4: 1.06, 3: 1.08, 2: 1.12}[bits]


@pytest.mark.parametrize(("bits", "columns"), [(8, 7), (4, 6), (4, 7), (3, 16), (3, 13), (2, 10)])
def test_packed_numbers_are_a_little_endian_stream(bits: int, columns: int) -> None:
    """Number i of a row takes the bits from i * bits on, and the runtime unpacks the same numbers."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), generator=generator, dtype=torch.int8)
    packed = pack(numbers, bits)
    for row, expected in zip(packed, numbers.tolist(), strict=True):
        stream = int.from_bytes(row.tobytes(), "little")
        actual = [(stream >> i * bits) % 2**bits - 2 ** (bits - 1) for i in range(columns)]
        assert actual == expected
    assert np.array_equal(unpack(packed, f"uint{bits}", columns), numbers.numpy().astype(np.float32))


def test_recipes_say_the_width_of_each_part() -> None:
    """Matrices take their part's width, vectors stay float32, and columns that do not divide by 32 get 8 bits."""
    shapes = {
        "embed_tokens.weight": (100, 64),
        "embed_tokens_per_layer.weight": (100, 32),
        "layers.0.mlp.up_proj.weight": (96, 64),
        "layers.0.per_layer_projection.weight": (64, 16),
        "norm.weight": (64,),
    }
    widths = stored_widths(RECIPES["int4"], "target", shapes)
    assert widths == {
        "embed_tokens.weight": Width(4, 128),
        "embed_tokens_per_layer.weight": Width(3),
        "layers.0.mlp.up_proj.weight": Width(4, 128),
        "layers.0.per_layer_projection.weight": Width(8),
    }
    assert stored_widths(RECIPES["fp32"], "target", shapes) == {}
    drafter = {"head.centroids": (8, 64), "head.clusters": (8, 640), "pre_projection.weight": (64, 128)}
    assert stored_widths(RECIPES["int4"], "drafter", drafter) == {"pre_projection.weight": Width(8)}
    assert FLOAT not in widths.values()


@pytest.mark.parametrize("scales", [Scales(), Scales(torch.float16)])
def test_numbers_that_bfloat16_rounded_come_out_to_the_last_bit(scales: Scales) -> None:
    """Checkpoints of Q4_0 have the products of integers and float16 scales in bfloat16."""
    numbers = torch.randint(-7, 8, (48, 8, 32), generator=torch.Generator().manual_seed(5))
    numbers[:, :, 3] = -8  # as Q4_0 has it in each group
    factors = torch.randn(48, 8, 1, generator=torch.Generator().manual_seed(6)).div(50).half().float()
    weight = (numbers * factors).bfloat16().view(48, 256)
    quantized = quantize(weight.float(), Width(4, 32), scales)
    assert torch.equal(quantized.numbers.view(48, 8, 32), numbers.to(torch.int8))
    assert torch.equal(quantized.dequantize().bfloat16(), weight)
    assert torch.equal(quantized.scales.to(scales.dtype).float(), quantized.scales)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_unpacking_undoes_packing(bits: int) -> None:
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 13), dtype=torch.int8)
    assert torch.equal(unpack_torch(torch.from_numpy(pack(numbers, bits)), bits, 13), numbers)


def test_integers_are_held_in_more_bits_and_smaller_groups() -> None:
    quantized = quantize(grid(2, 64), Width(2, 64))
    wider = quantized.held_as(Width(4, 32))
    assert (wider.bits, wider.group_size) == (4, 32)
    assert torch.equal(wider.dequantize(), quantized.dequantize())
    assert held(Width(2, 64), Width(4, 32), 256) == Width(4, 32)
    assert held(Width(2, 64), Width(4), 256) == Width(4, 64)
    assert held(Width(4), Width(3), 256) is None
    assert held(Width(2, 64), FLOAT, 256) == FLOAT
    assert held(Width(4), Width(4, 128), 96) == Width(4, 32)  # which divides both
    assert held(Width(4), Width(4, 128), 64) == Width(4)
