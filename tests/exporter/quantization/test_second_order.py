"""Rounding by inputs: GPTQ against its definition, errors below those of the nearest integers, grids kept."""

import pytest
import torch
from torch import Tensor

from exporter.quantization import second_order
from exporter.quantization.numbers import Quantized, Scales, best_scales, quantize
from exporter.quantization.second_order import Inputs, add_products, part_columns, quantize_for
from exporter.quantization.widths import Width

BACKEND_SCALES = [Scales(), Scales(torch.bfloat16, negative=False)]


def random_inputs(columns: int, rows: int = 400) -> Tensor:
    """Inputs that vary most in few directions, as those of a model do."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(columns // 4, columns, generator=generator)
    return torch.randn(rows, columns // 4, generator=generator) @ directions + 0.1 * torch.randn(
        rows, columns, generator=generator
    )


def inputs_of(x: Tensor, group_size: int | None = None) -> Inputs:
    size = part_columns(x.shape[1], group_size)
    grams = [torch.zeros(size, size) for _ in range(x.shape[1] // size)]
    for part in x.split(100):
        add_products(grams, part)
    return Inputs.of(grams)


def output_errors(weight: Tensor, rounded: Quantized, x: Tensor) -> Tensor:
    """Squared error of each output over the inputs."""
    return (x @ (weight - rounded.dequantize()).T).square().sum(0)


def test_columns_are_rounded_as_gptq_defines_it() -> None:
    """Each error goes to the columns that remain, by the inverse of their own part of G (equation 2 of the paper)."""
    x, columns = random_inputs(64), 64
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    inputs = inputs_of(x)
    ((_, gram),) = inputs.parts
    actual, scales = second_order._spread(weight.T.contiguous(), inputs.factors[0], 32, 4, Scales(), None)
    remaining, expected = weight.double().clone(), torch.empty(5, columns, dtype=torch.float64)
    for column in range(columns):
        inverse = torch.linalg.inv(gram[column:, column:].double())
        scale = scales[column // 32].double()
        expected[:, column] = (remaining[:, column] / scale).round().clamp(-8, 7)
        error = (remaining[:, column] - expected[:, column] * scale) / inverse[0, 0]
        remaining[:, column:] -= error.unsqueeze(1) * inverse[0]
    assert torch.equal(actual.T.double(), expected)


@pytest.mark.parametrize("allowed", BACKEND_SCALES)
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_outputs_change_less_than_with_the_nearest_integers(group_size: int | None, allowed: Scales) -> None:
    x, width = random_inputs(256), Width(4, group_size)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    nearest, tuned = quantize(weight, width, allowed), quantize_for(weight, inputs_of(x), width, allowed)
    errors, nearest_errors = output_errors(weight, tuned, x), output_errors(weight, nearest, x)
    assert float(errors.sum() / nearest_errors.sum()) < 0.4
    assert bool((errors <= nearest_errors * 1.001).all())
    assert tuned.scales.shape == nearest.scales.shape
    assert torch.equal(tuned.scales, tuned.scales.to(allowed.dtype).float())
    assert allowed.negative or bool((tuned.scales > 0).all())
    assert int(tuned.numbers.min()) >= -8
    assert int(tuned.numbers.max()) <= 7


@pytest.mark.parametrize("stage", ["_fitted_scales", "_descend"])
def test_each_stage_lowers_the_error(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, width = random_inputs(256), Width(4, 32)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    whole = output_errors(weight, quantize_for(weight, inputs_of(x), width), x).sum()
    unchanged = {"_fitted_scales": lambda w, n, scales, *_: scales, "_descend": lambda w, numbers, *_: numbers}
    monkeypatch.setattr(second_order, stage, unchanged[stage])
    assert float(whole) < 0.99 * float(output_errors(weight, quantize_for(weight, inputs_of(x), width), x).sum())


def test_a_matrix_on_a_grid_is_reproduced() -> None:
    x, width = random_inputs(256), Width(4, 32)
    weight = quantize(torch.randn(10, 256, generator=torch.Generator().manual_seed(4)), width).dequantize()
    weight[3] = torch.randn(256, generator=torch.Generator().manual_seed(5))
    tuned = quantize_for(weight, inputs_of(x), width).dequantize()
    on_grid = [row for row in range(10) if row != 3]
    torch.testing.assert_close(tuned[on_grid], weight[on_grid], rtol=1e-6, atol=0)
    assert not torch.allclose(tuned[3], weight[3], rtol=1e-3)


@pytest.mark.parametrize("group_size", [32, None])
def test_wide_matrices_are_rounded_in_parts(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with one scale keeps one; each part alone is better than the nearest integers."""
    monkeypatch.setattr(second_order, "MAX_COLUMNS", 100)
    x, width = random_inputs(256), Width(4, group_size)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    inputs = inputs_of(x, group_size)
    assert [start for start, _ in inputs.parts] == [0, 64, 128, 192]
    nearest, tuned = quantize(weight, width), quantize_for(weight, inputs, width)
    assert tuned.scales.shape == nearest.scales.shape
    for start in range(0, 256, 64):
        part = slice(start, start + 64)
        errors = [(x[:, part] @ (weight - r.dequantize())[:, part].T).square().sum() for r in (tuned, nearest)]
        assert float(errors[0]) < 0.9 * float(errors[1])


@pytest.mark.parametrize(
    ("columns", "group_size", "expected"),
    [(1536, 128, 1536), (6144, 128, 3072), (12288, 128, 4096), (10240, 128, 2560), (12288, None, 4096), (96, 32, 96)],
)
def test_parts_are_equal_and_hold_whole_groups(columns: int, group_size: int | None, expected: int) -> None:
    assert part_columns(columns, group_size) == expected


def test_inputs_that_reach_no_column_leave_it_to_the_nearest_integers() -> None:
    """Tokens that never occur in the texts, or a gate that is always shut."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    rounded = quantize_for(weight, Inputs.of([torch.zeros(64, 64)]), Width(4, 32))
    assert torch.equal(rounded.dequantize(), quantize(weight, Width(4, 32)).dequantize())


def test_importance_moves_a_scale_towards_what_counts() -> None:
    group = torch.tensor([[1.0, 0.33, 0.2]])
    counts = torch.tensor([0.0, 1.0, 0.0])

    def error(scale: Tensor) -> float:
        return float(((group / scale).round().clamp(-8, 7) * scale - group)[0, 1].abs())

    assert error(best_scales(group, 4, Scales(), counts)) < error(best_scales(group, 4, Scales()))
