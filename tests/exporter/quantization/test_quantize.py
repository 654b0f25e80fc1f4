"""Few bits: numbers on a grid stay on it, packing is what FORMAT.md says, recipes reach what they are for."""

import numpy as np
import pytest
import torch

from exporter.quantization.numbers import FLOAT, Scales, Width, fitting_width, pack, quantize
from exporter.quantization.recipes import RECIPES, drafter_widths, target_widths
from runtime_ref.tables import unpack

XNNPACK = Scales(torch.bfloat16, negative=False)


def grid(bits: int, group: int, rows: int = 48, columns: int = 256, signed: bool = True) -> torch.Tensor:
    """A matrix on a grid, its scales in float16, of either sign; no group need reach the ends of its range."""
    generator = torch.Generator().manual_seed(bits + group)
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns // group, group), generator=generator)
    numbers[::3] //= 2
    numbers[5] = 0
    scales = torch.randn(rows, columns // group, 1, generator=generator).half().float()
    return (numbers * (scales if signed else scales.abs())).view(rows, columns)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (4, 256), (3, 64), (2, 32)])
def test_what_lies_on_a_grid_comes_out_on_it(bits: int, group: int) -> None:
    """Zero error, as for checkpoints trained for Q4_0."""
    weight = grid(bits, group)
    assert torch.equal(quantize(weight, Width(bits, group)).dequantize(), weight)


def test_xnnpacks_scales_are_positive_and_bfloat16() -> None:
    """It refuses others. A grid with such scales is kept; one with negative scales cannot be, at its lowest number."""
    weight = grid(4, 32)
    found = quantize(weight, Width(4, 32), XNNPACK)
    assert (found.scales > 0).all()
    assert torch.equal(found.scales.bfloat16().float(), found.scales)
    positive = (found.numbers.view(48, -1, 32) * found.scales.unsqueeze(2)).view(48, -1)
    assert torch.equal(quantize(positive, Width(4, 32), XNNPACK).dequantize(), positive)


def test_groups_are_as_fine_as_the_grid() -> None:
    """Groups of 128, but of 32 for a checkpoint on such a grid, or for rows that have no groups of 128."""
    asked = Width(4, 128)
    assert fitting_width(asked, grid(4, 32)) == Width(4, 32)
    assert fitting_width(asked, grid(4, 128)) == asked
    assert fitting_width(asked, torch.randn(8, 256, generator=torch.Generator().manual_seed(0))) == asked
    assert fitting_width(asked, torch.ones(8, 96)) == Width(4, 32)
    assert fitting_width(Width(4), grid(4, 32)) == Width(4, 32)
    assert fitting_width(Width(8), torch.ones(8, 60)) == Width(8)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_no_scale_near_the_chosen_one_is_better(bits: int) -> None:
    """Random groups: the search is within a few percent of the best scale that a fine scan finds."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    found = (quantize(weight, Width(bits)).dequantize() - weight).norm()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = torch.full((64,), torch.inf)
    for share in torch.linspace(0.2, 1.2, 200):
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1)) * share * 2
        rounded = (weight / scale).round().clamp(low, high) * scale
        best = torch.minimum(best, (rounded - weight).norm(dim=1))
    assert found < best.norm() * {8: 1.05, 4: 1.06, 3: 1.08, 2: 1.12}[bits]


@pytest.mark.parametrize(("bits", "columns"), [(8, 7), (4, 6), (4, 7), (3, 16), (3, 13), (2, 10)])
def test_packed_numbers_are_a_little_endian_stream(bits: int, columns: int) -> None:
    """Number i of a row takes the bits from i * bits on, and the runtime reads the same numbers back."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), generator=generator, dtype=torch.int8)
    packed = pack(numbers, bits)
    for row, wanted in zip(packed, numbers.tolist(), strict=True):
        stream = int.from_bytes(row.tobytes(), "little")
        found = [(stream >> i * bits) % 2**bits - 2 ** (bits - 1) for i in range(columns)]
        assert found == wanted
    assert np.array_equal(unpack(packed, f"uint{bits}", columns), numbers.numpy().astype(np.float32))


def test_recipes_say_what_each_part_takes() -> None:
    """Matrices follow their row of the recipe, vectors stay, and rows that do not divide by 32 take 8 bits."""
    shapes = {
        "embed_tokens.weight": (100, 64),
        "embed_tokens_per_layer.weight": (100, 32),
        "layers.0.mlp.up_proj.weight": (96, 64),
        "layers.0.per_layer_projection.weight": (64, 16),
        "norm.weight": (64,),
    }
    widths = target_widths(RECIPES["int4"], shapes)
    assert widths == {
        "embed_tokens.weight": Width(4, 128),
        "embed_tokens_per_layer.weight": Width(3),
        "layers.0.mlp.up_proj.weight": Width(4, 128),
        "layers.0.per_layer_projection.weight": Width(8),
    }
    assert target_widths(RECIPES["fp32"], shapes) == {}
    drafter = {"head.centroids": (8, 64), "head.clusters": (8, 640), "pre_projection.weight": (64, 128)}
    assert drafter_widths(RECIPES["int4"], drafter) == {"pre_projection.weight": Width(8)}
    assert FLOAT not in widths.values()
