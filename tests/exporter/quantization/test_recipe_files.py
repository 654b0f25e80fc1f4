"""Recipes as files: what they may say, what a bundle says of itself, and bundles of mixed widths."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.bundle.inspection import inspect
from exporter.checkpoint.pair import open_pair
from exporter.graphs.onnx import stored_weights
from exporter.parity.stages import run_parity
from exporter.quantization.recipes import RECIPES, Recipe, Rule, read_recipe, recipe_of
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, read_manifest
from tests.conftest import Run

Pairs = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_is_written(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPES[name].toml())
    assert read_recipe(file) == replace(RECIPES[name], name="recipe.toml")


def test_the_first_rule_that_matches_decides() -> None:
    recipe = Recipe("r", (Rule("target.a*", Width(4, 32)), Rule("target.*", Width(8))))
    assert [recipe.width(name) for name in ("target.ab", "target.b", "drafter.a")] == [Width(4, 32), Width(8), FLOAT]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = [", "cannot be read as a recipe"),
        ("", "has no list `rules`"),
        ("rules = []\nbits = 4", "has the key 'bits', expected `rules` alone"),
        ('rules = ["*"]', "rule 1 is '*', expected the keys match, bits and perhaps group"),
        ('rules = [{ match = "*" }]', "rule 1 is {'match': '*'}, expected the keys"),
        ('rules = [{ match = "*", bits = true }]', "rule 1: bits is True, expected int"),
        ('rules = [{ match = "*", bits = 8, size = 1 }]', "expected the keys match, bits and perhaps group"),
        ('rules = [{ match = "*", bits = 5 }]', "rule 1 for '*' is 5 bits, expected one of 2 bits, 3 bits, 4 bits"),
        ('rules = [{ match = "*", bits = -1 }]', "rule 1 for '*' is -1 bits, expected one of"),
        ('rules = [{ match = "*", bits = 4, group = 0 }]', "is 4 bits in groups of 0, expected one of"),
        ('rules = [{ match = "*", bits = 8, group = 32 }]', "is 8 bits in groups of 32, expected one of"),
        ('rules = [{ match = "*", bits = 3 }]', "stores drafter.head.clusters in 3 bits, expected 4 bits, 8 bits, 32"),
        ("rules = " + "[" * 5000 + "]" * 5000, "cannot be read as a recipe"),
        (
            'rules = [{ match = "target.embed_tokens_*", bits = 4, group = 64 }]',
            "expected 2 bits, 3 bits, 4 bits, 4 bits in groups of 32, 8 bits, 32 bits",
        ),
        (
            'rules = [{ match = "drafter.head.*", bits = 4, group = 32 }]',
            "stores drafter.head.clusters in 4 bits in groups of 32",
        ),
        ('rules = [{ match = "target.layer.*", bits = 8 }]', "the rule for 'target.layer.*' matches no matrix"),
        (
            'rules = [{ match = "*", bits = 8 }, { match = "target.*", bits = 4 }]',
            "the rule for 'target.*' comes too late for all that it matches",
        ),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_line(
    text: str, message: str, run: Run, pair_dirs: Pairs, tmp_path: Path
) -> None:
    (tmp_path / "r.toml").write_text(text)
    target, drafter = pair_dirs("e2b")
    paths = "--target", target, "--drafter", drafter, "--output", tmp_path / "b"
    code, _, err = run("export", *paths, "--recipe", tmp_path / "r.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert "r.toml" in err
    assert not (tmp_path / "b").exists()


def test_a_recipe_that_does_not_exist(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("e2b")
    code, _, err = run("export", "--target", target, "--drafter", drafter, "--output", tmp_path, "--recipe", "int5")
    assert code == 2
    assert "'int5' is neither a file nor one of auto, fp32, int8, int4, smallest" in err


def test_a_bundle_of_mixed_widths(bundle: Callable[..., Path], pair_dirs: Pairs, run: Run) -> None:
    """Each matrix has the width of its rule, the manifest says so, and parity takes it from there."""
    path = bundle("e2b", "onnx", "mixed")
    manifest, stored = read_manifest(path), stored_weights(path / "target.onnx")
    widths = {name: w["bits"] for w in manifest.raw["widths"] for name in w["matrices"]}
    for name, bits in (("up_proj", 4), ("down_proj", 8), ("q_proj", 4), ("o_proj", None)):
        full = next(name_ for name_ in stored if name in name_ and not name_.endswith(".scales"))
        assert widths.get(f"target.{full}") == bits
        assert (f"{full}.scales" in stored) == (bits is not None)
    groups = {name: w["group_size"] for w in manifest.raw["widths"] for name in w["matrices"]}
    assert {groups["target.layers.0.mlp.up_proj.weight"], groups["target.layers.0.self_attn.q_proj.weight"]} == {32, 64}
    assert recipe_of(manifest) != RECIPES["int4"]
    checks = run_parity(path, open_pair(*pair_dirs("e2b")), [[5], list(range(3, 40))], 12)
    assert [check for check in checks if not check.passed] == []
    assert any(check.stage == "recipe" for check in checks)
    shown = inspect(path)["widths"]
    assert {(w["bits"], w["group_size"]) for w in shown} == {(4, 32), (4, 64), (8, None), (4, None), (2, None)}
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "target.layers.*.mlp.up_proj.weight" in out.replace("\n", "").replace(" ", "").replace("│", "")


def test_parity_fails_if_the_manifest_lists_other_widths(
    bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(bundle("e2b", "onnx", "mixed"), tmp_path / "b"))
    raw = json.loads((path / MANIFEST).read_text())
    entry = next(w for w in raw["widths"] if w["group_size"] == 64)
    entry["group_size"] = 32
    (path / MANIFEST).write_text(json.dumps(raw))
    checks = run_parity(path, open_pair(*pair_dirs("e2b")), [[5]], 4)
    assert "target weights" in [check.output for check in checks if not check.passed]


def test_bundles_of_earlier_versions_are_known_by_their_recipe(bundle: Callable[..., Path]) -> None:
    manifest = read_manifest(bundle("e2b", "onnx", "int4"))
    raw = {key: value for key, value in manifest.raw.items() if key != "widths"}
    assert recipe_of(replace(manifest, raw=raw)) == RECIPES["int4"]
    with pytest.raises(InputError, match="recipe 'int5' is unknown"):
        recipe_of(replace(manifest, raw=raw, recipe="int5"))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"bits": "4", "group_size": None, "matrices": ["target.a"]},
        {"bits": 9, "group_size": None, "matrices": ["target.a"]},
    ],
)
def test_widths_that_are_malformed(entry: dict, bundle: Callable[..., Path]) -> None:
    manifest = read_manifest(bundle("e2b", "onnx", "int4"))
    with pytest.raises(InputError, match=r"manifest\.json: widths is malformed"):
        recipe_of(replace(manifest, raw={**manifest.raw, "widths": [entry]}))


def test_patterns_are_written_so_that_they_are_read(tmp_path: Path) -> None:
    recipe = Recipe("r.toml", (Rule('a"\\b', Width(4, 32)),))
    (tmp_path / "r.toml").write_text(recipe.toml())
    assert read_recipe(tmp_path / "r.toml") == recipe


def test_rules_are_checked_against_the_head_that_clusters_make(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    """Before minutes of clustering."""
    target, drafter = pair_dirs("dense")
    paths = "--target", target, "--drafter", drafter, "--output", tmp_path / "b", "--recipe", tmp_path / "r.toml"
    (tmp_path / "r.toml").write_text('rules = [{ match = "drafter.head.weight", bits = 8 }]')
    code, _, err = run("export", *paths, "--head", "kmeans")
    assert (code, "'drafter.head.weight' matches no matrix" in err, err.count("\n")) == (2, True, 1)
    (tmp_path / "r.toml").write_text('rules = [{ match = "drafter.head.clusters", bits = 8 }]')
    code, _, err = run("export", *paths)
    assert (code, "'drafter.head.clusters' matches no matrix" in err) == (2, True)


def test_parity_fails_if_the_manifest_lists_matrices_that_there_are_not(
    bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(bundle("e2b", "onnx", "mixed"), tmp_path / "b"))
    raw = json.loads((path / MANIFEST).read_text())
    raw["widths"].append({"bits": 8, "group_size": None, "matrices": ["drafter.no_such.weight"]})
    (path / MANIFEST).write_text(json.dumps(raw))
    checks = run_parity(path, open_pair(*pair_dirs("e2b")), [[5]], 4)
    assert [c.detail for c in checks if not c.passed] == ["differs: widths"]
