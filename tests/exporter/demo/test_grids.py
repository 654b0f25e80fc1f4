"""Weights of the built-in pair lie exactly on low-bit grids, and rounding to such grids is stable."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporter.demo.training.qat import grid, on_grid, round_to_five_bits, snap

Directories = tuple[Path, Path]


def test_every_matrix_of_the_built_in_pair_is_on_its_grid(pair_dirs: Callable[[str], Directories]) -> None:
    for directory in pair_dirs("demo"):
        for name, tensor in load_file(directory / "model.safetensors").items():
            if tensor.dim() == 2 and "masked_embedding" not in name:
                assert tensor.dtype == torch.bfloat16
                assert on_grid(tensor, *grid(name, tensor.shape)), name


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 16), (3, 16)])
def test_snapping_twice_changes_nothing(bits: int, group: int) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64)[:, None]
    weight[3] = 0
    snapped = snap(weight, bits, group)
    assert on_grid(snapped, bits, group)
    assert snap(snapped, bits, group).equal(snapped)
    assert snapped.bfloat16().float().equal(snapped)
    assert not on_grid(weight.bfloat16(), bits, group)
    snapped[5, 7] *= 1.0625
    assert not on_grid(snapped, bits, group)


def test_the_best_of_several_scales_has_a_smaller_error_than_the_largest() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    largest_scale = round_to_five_bits(weight.abs().amax(-1, keepdim=True) / 7)
    rounded = (weight / largest_scale).round() * largest_scale
    error, error_of_largest = ((actual - weight).square().mean(-1) for actual in (snap(weight, 4, 32), rounded))
    assert (error <= error_of_largest).all()
    assert error.mean() < 0.9 * error_of_largest.mean()
