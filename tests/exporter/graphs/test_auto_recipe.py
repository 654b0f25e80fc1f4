"""The recipe `auto` keeps the grids that weights lie on, the per-layer embeddings among them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint.pair import Pair, open_pair
from exporter.demo.synthetic import SyntheticPair
from exporter.graphs.auto_recipe import auto_recipe
from exporter.quantization.recipes import PER_LAYER_TABLE, RECIPES
from exporter.quantization.widths import FLOAT, Width
from tests.conftest import Run
from tests.exporter.demo.test_synthetic import DRAFTER, TARGET

WITH_PLE = replace(TARGET, hidden_size_per_layer_input=64)  # two groups of 32


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q4_0") / "pair"
    SyntheticPair(WITH_PLE, DRAFTER, form="qat-q4_0").write(path)
    return path


def opened(path: Path) -> Pair:
    return open_pair(path / "target", path / "drafter")


def test_the_grid_of_q4_0(q4_0: Path, tmp_path: Path, run: Run) -> None:
    """Every group comes out as it is; `int4` rounds PLE to 3 bits, and is smaller by as much as is said."""
    recipe, reason = auto_recipe(opened(q4_0))
    assert recipe.width(PER_LAYER_TABLE) == Width(4, 32)
    assert recipe.width("target.layers.0.mlp.up_proj.weight") == Width(4, 128)  # groups of 32 are kept there as well
    assert recipe.width("drafter.pre_projection.weight") == Width(4, 32)
    source, sizes = ["--target", q4_0 / "target", "--drafter", q4_0 / "drafter"], {}
    for name in ("auto", "int4"):
        code, _, err = run("export", *source, "--output", tmp_path / name, "--recipe", name, "--no-calibrate")
        assert code == 0
        sizes[name] = (tmp_path / name / "per_layer.table").stat().st_size
        code, out, _ = run("parity", tmp_path / name, *source, "--max-new-tokens", 4, "--json")
        (check,) = [c for c in json.loads(out)["checks"] if c["output"] == "groups on a grid"]
        kept, total = map(int, re.findall(r"\d+", check["detail"])[:2])
        assert code == 0 and kept == total > 1000
        if name == "auto":
            assert f"recipe auto: {reason}" in " ".join(err.split())
    assert sizes["auto"] - sizes["int4"] == int(reason.split()[-3])


def test_8_bits_in_float32_are_found(q4_0: Path, tmp_path: Path) -> None:
    """As a packed checkpoint has them after it was dequantized; bfloat16 has rounded them beyond recognition."""
    name, path = "model.language_model.layers.0.per_layer_input_gate.weight", tmp_path / "pair"
    SyntheticPair(WITH_PLE, DRAFTER, form="qat-q4_0").write(path)
    file = path / "target" / "model.safetensors"
    tensors = load_file(file)
    numbers = torch.randint(-127, 128, tensors[name].shape, generator=torch.Generator().manual_seed(0))
    numbers[:, 0] = 127
    save_file({**tensors, name: numbers * torch.rand(len(numbers), 1)}, file)
    recipe, _ = auto_recipe(opened(path))
    assert recipe.width("target.layers.0.per_layer_input_gate.weight") == Width(8)
    assert recipe.width("target.layers.1.per_layer_input_gate.weight") == Width(4, 128)


def test_weights_on_no_grid_get_int4(tmp_path: Path) -> None:
    SyntheticPair(TARGET, DRAFTER).write(tmp_path / "pair")
    assert auto_recipe(opened(tmp_path / "pair"))[0] == RECIPES["int4"]


@pytest.mark.parametrize("drafter_form", ["bf16", "qat-q4_0"])
def test_a_mobile_target_with_either_drafter(drafter_form: str, tmp_path: Path, run: Run) -> None:
    """The target's integers, and the drafter's grid if it has one."""
    SyntheticPair(WITH_PLE, DRAFTER, form="qat-mobile").write(tmp_path / "mobile")
    SyntheticPair(WITH_PLE, DRAFTER, form=drafter_form).write(tmp_path / "other")
    target, drafter = tmp_path / "mobile" / "target", tmp_path / "other" / "drafter"
    recipe, _ = auto_recipe(open_pair(target, drafter))
    on_grid = Width(4, 32) if drafter_form == "qat-q4_0" else Width(8)
    assert recipe.width("drafter.pre_projection.weight") == on_grid
    assert recipe.width("target.embed_tokens.weight") == Width(2)
    source = ["--target", target, "--drafter", drafter]
    assert run("export", *source, "--output", tmp_path / "b")[0] == 0
    assert run("parity", tmp_path / "b", *source, "--max-new-tokens", 4)[0] == 0


def test_what_a_packed_checkpoint_leaves_in_floats_stays_so(tmp_path: Path) -> None:
    SyntheticPair(TARGET, DRAFTER, form="qat-mobile").write(tmp_path / "pair")
    recipe, _ = auto_recipe(opened(tmp_path / "pair"))
    assert recipe.width("target.per_layer_model_projection.weight") == FLOAT
    assert recipe.width("target.embed_tokens.weight") == Width(2)
    assert recipe.width(PER_LAYER_TABLE) == Width(4)
    assert recipe.width("drafter.pre_projection.weight") == RECIPES["int4"].width("drafter.pre_projection.weight")
