"""Exports say when weights are rounded to 4 bits that lie on no such grid."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.pair import open_pair
from exporter.graphs.grids import grid_warnings
from exporter.graphs.parts import graph_parts
from exporter.quantization.numbers import fitting_width, lies_on_grid
from exporter.quantization.recipes import RECIPES
from exporter.quantization.widths import Width
from tests.conftest import Run

Pairs = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("group_size", [128, 32])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_grid_is_found_as_checkpoints_store_it(group_size: int, rounded: bool) -> None:
    """In float32, and rounded to bfloat16, with its own groups; not after one number was moved by half a step."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (8, 256), generator=generator).float()
    scales = torch.rand(8, 256 // group_size, generator=generator) + 0.1
    rows = numbers * scales.repeat_interleave(group_size, 1)
    rows = rows.bfloat16().float() if rounded else rows
    assert fitting_width(Width(4, 128), rows) == Width(4, group_size)
    assert lies_on_grid(rows, Width(4, group_size))
    assert not lies_on_grid(torch.randn(8, 256, generator=generator), Width(4, group_size))
    rows[3, 7] += float(scales[3, 0]) / 2
    assert not lies_on_grid(rows, Width(4, group_size))


def test_the_built_in_pair_lies_on_its_grid(pair_dirs: Pairs) -> None:
    pair = open_pair(*pair_dirs("demo"))
    assert [grid_warnings(graph_parts(pair, RECIPES[name]), name) for name in ("fp32", "int8", "int4")] == [[], [], []]


def test_an_export_of_other_weights_says_so(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("e2b")
    common = ("export", "--target", target, "--drafter", drafter, "--max-seq-len", 600, "--no-calibrate", "--json")
    code, out, err = run(*common, "--recipe", "int4", "--output", tmp_path / "int4")
    (warning,) = json.loads(out)["warnings"]
    assert code == 0
    assert warning.startswith("recipe int4: ")
    assert "(100%, such as " in warning
    assert f"warning: {warning}" in err
    assert json.loads(run(*common, "--recipe", "fp32", "--output", tmp_path / "fp32")[1])["warnings"] == []
