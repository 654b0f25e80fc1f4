"""Packed checkpoints: their integers and scales arrive unchanged, and their targets compute what transformers does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.calibration.calibrate import calibrate
from exporter.checkpoint.pair import Pair, open_pair
from exporter.checkpoint.tensors import IntegerReader
from exporter.graphs.auto_recipe import auto_recipe
from exporter.modeling.target import empty_kv
from exporter.parity.quality import bundle_logits
from exporter.parity.source import open_source
from exporter.parity.stages import run_parity
from exporter.quantization.numbers import Quantized, Scales
from exporter.quantization.recipes import RECIPES, Recipe, Rule
from exporter.quantization.widths import Width
from exporter.texts.token_texts import TokenTexts
from runtime_ref.engine import open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.tables import Table
from tests.conftest import Directories, Run
from tests.exports import MAX_SEQ_LEN
from tests.packed import PREFIX, mobile_reference, packed, stored_integers, to_compressed_tensors, to_mobile
from tests.pairs import to_published

Pairs = Callable[[str], Directories]
TOKENS = torch.tensor([2, 77, 130, 9])


def mobile_pair(pair_dirs: Pairs, tmp_path: Path, name: str = "e2b", **options: Any) -> Pair:
    target, drafter = pair_dirs(name)
    return open_pair(to_mobile(target, tmp_path / "mobile", **options), drafter)


def logits_of(pair: Pair) -> Tensor:
    rows = torch.arange(len(TOKENS))
    return pair.load_target()(TOKENS, torch.tensor([0]), rows, empty_kv(pair.target, len(rows))).logits


def integers(read: Callable[[], Tensor]) -> Quantized:
    assert isinstance(read, IntegerReader)
    return Quantized.join(read.quantized_blocks())


def packed_matrices(pair: Pair) -> dict[str, Quantized]:
    return {n: integers(read) for n, read in pair.checkpoint_weights.items() if isinstance(read, IntegerReader)}


def assert_as_stored(found: dict[str, Quantized], target: Path) -> None:
    tensors = load_file(target / "model.safetensors")
    for name, matrix in found.items():
        stem = name.removesuffix(".weight") if name.startswith("lm_head") else PREFIX + name.removesuffix(".weight")
        numbers, scales = stored_integers(tensors, stem, matrix.bits)
        assert torch.equal(matrix.numbers, numbers[:, : matrix.numbers.shape[1]])
        assert torch.equal(matrix.scales, scales)


@pytest.mark.parametrize("shape", ["e2b", "odd"])
@pytest.mark.parametrize("own_head", [False, True])
def test_integers_and_scales_of_the_mobile_form(shape: str, own_head: bool, pair_dirs: Pairs, tmp_path: Path) -> None:
    """`odd` has rows that end within a byte."""
    pair = mobile_pair(pair_dirs, tmp_path, shape, own_head=own_head)
    found = packed_matrices(pair)
    assert {matrix.bits for matrix in found.values()} == {2, 4, 8}
    assert pair.head == ("lm_head.weight" if own_head else "embed_tokens.weight")
    assert_as_stored(found, tmp_path / "mobile")
    model = mobile_reference(tmp_path / "mobile")
    expected = model(TOKENS[None]).logits[0]
    assert (logits_of(pair) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_activations_are_rounded_as_by_the_reference(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair = mobile_pair(pair_dirs, tmp_path, activations=True)
    expected = mobile_reference(tmp_path / "mobile")(TOKENS[None]).logits[0]
    assert (logits_of(pair) - expected).abs().max() > 1e-2
    assert (logits_of(pair.with_activations()) - expected).abs().max() < 1e-5


def test_ties_of_logits_on_a_grid_go_to_the_lowest_id(pair_dirs: Pairs, tmp_path: Path) -> None:
    """An output scale of the head rounds logits to a few values."""

    def coarse(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.output_activation_scale"] = torch.tensor(2.0)

    target, drafter = pair_dirs("e2b")
    mobile = to_mobile(target, tmp_path / "mobile", change=coarse)
    pair, logits = open_pair(mobile, drafter).with_activations(), mobile_reference(mobile)(TOKENS[None]).logits[0]
    assert torch.equal(logits_of(pair), logits)
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any()
    export_bundle(pair, tmp_path / "bundle", ExportOptions("onnx", auto_recipe(pair)[0], MAX_SEQ_LEN))
    values, ids, _ = bundle_logits(open_engine(tmp_path / "bundle"), TOKENS.tolist())
    assert (values[:, 0] == values[:, 1]).any()
    assert (ids[:, 1:] > ids[:, :-1])[values[:, 1:] == values[:, :-1]].all()


def test_compressed_tensors(pair_dirs: Pairs, tmp_path: Path) -> None:
    """The reference multiplies in the dtype of the scales, so it is given float32."""

    def as_float32(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: t.float() for name, t in tensors.items() if name.endswith("weight_scale")}

    target, drafter = pair_dirs("e2b")
    compressed = to_compressed_tensors(target, tmp_path / "ct")
    found = packed_matrices(open_pair(compressed, drafter))
    assert len(found) > 20 and {(matrix.bits, matrix.group_size) for matrix in found.values()} == {(4, 32)}
    assert_as_stored(found, compressed)
    compressed = to_compressed_tensors(target, tmp_path / "float32", as_float32)
    decompressed = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        compressed, dtype=torch.float32, ignore_mismatched_sizes=True, quantization_config=decompressed
    )
    expected = model(TOKENS[None]).logits[0]
    assert (logits_of(open_pair(compressed, drafter)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("backend", "shape"), [("onnx", "e2b"), ("executorch", "tiny")])
@pytest.mark.parametrize("own_head", [False, True])
def test_a_bundle_holds_what_the_checkpoint_has(
    backend: str, shape: str, own_head: bool, pair_dirs: Pairs, tmp_path: Path
) -> None:
    """And its rows of embeddings are integers times scales; parity compares everything else bit by bit."""
    pair, bundle = mobile_pair(pair_dirs, tmp_path, shape, own_head=own_head), tmp_path / "bundle"
    export_bundle(pair, bundle, ExportOptions(backend, auto_recipe(pair)[0], MAX_SEQ_LEN))
    source = open_source(bundle, tmp_path / "mobile", pair_dirs(shape)[1])
    checks = run_parity(bundle, source, [[2, 77, 130, 9]], 8)
    assert [check for check in checks if not check.passed] == []
    manifest, found = read_manifest(bundle), packed_matrices(pair)
    for name, weight in (("embed_tokens", "embed_tokens"), ("embed_tokens_per_layer", "embed_tokens_per_layer")):
        rows = Table(bundle, manifest.tables[name])[range(256)]
        assert torch.equal(torch.from_numpy(rows), found[f"{weight}.weight"].dequantize())
    assert ("head" in manifest.tables) == own_head
    widths = {name: entry["bits"] for entry in manifest.raw["widths"] for name in entry["matrices"]}
    assert {name: widths[f"target.{name}"] for name in found} == {name: matrix.bits for name, matrix in found.items()}
    assert "target.per_layer_model_projection.weight" not in widths
    stored = (bundle / ("target.weights" if backend == "onnx" else "model.pte")).read_bytes()
    matrix = found["layers.1.mlp.up_proj.weight"]
    assert packed(matrix.numbers, 4).numpy().tobytes() in stored
    assert matrix.scales.numpy().tobytes() in stored


def test_integers_of_2_bits_stay_so_on_onnx(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair = mobile_pair(pair_dirs, tmp_path)
    export_bundle(pair, tmp_path / "bundle", ExportOptions("onnx", auto_recipe(pair)[0], MAX_SEQ_LEN))
    graph = onnx.load(tmp_path / "bundle" / "target.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {
        node.input[1]: {a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"
    }
    name = "layers.3.mlp.up_proj.weight"
    matrix = packed_matrices(pair)[name]
    assert (nodes[name]["bits"], nodes[name]["block_size"], matrix.bits) == (2, 64, 2)
    assert weights[name].tobytes() == packed(matrix.numbers, 2).numpy().tobytes()
    assert weights[f"{name}.scales"].tobytes() == matrix.scales.numpy().tobytes()


@pytest.mark.parametrize("recipe", ["int4", "int8", "smallest"])
def test_other_recipes_hold_the_integers_or_are_refused(recipe: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    pair = mobile_pair(pair_dirs, tmp_path)
    options = ExportOptions("onnx", RECIPES[recipe], MAX_SEQ_LEN)
    if recipe != "int8":
        with pytest.raises(
            InputError,
            match=r"stores target\.embed_tokens_per_layer\.weight in [23] bits, but .* has it in 4 bits, and packed",
        ):
            export_bundle(pair, tmp_path / "bundle", options)
        return
    export_bundle(pair, tmp_path / "bundle", options)
    rows = Table(tmp_path / "bundle", read_manifest(tmp_path / "bundle").tables["embed_tokens"])[range(256)]
    assert torch.equal(torch.from_numpy(rows), packed_matrices(pair)["embed_tokens.weight"].dequantize())


@pytest.mark.parametrize("recipe", ["auto", "int4", "int8", "fp32"])
@pytest.mark.parametrize("group_size", [32, 16])
def test_groups_of_compressed_tensors_in_other_recipes(
    recipe: str, group_size: int, pair_dirs: Pairs, tmp_path: Path, run: Run
) -> None:
    """What is exported is proven; what no runtime has in such groups is one line."""
    target, drafter = pair_dirs("e2b")
    to_compressed_tensors(target, tmp_path / "ct", group_size=group_size)
    source = ["--target", tmp_path / "ct", "--drafter", drafter]
    code, _, err = run("export", *source, "--output", tmp_path / "b", "--recipe", recipe, "--no-calibrate")
    if recipe == "int8" or (group_size == 16 and recipe != "fp32"):
        other = "fp32" if recipe == "auto" else "auto, which keeps them"
        assert code == 2 and f"in 4 bits in groups of {group_size}, and packed integers are not rounded again" in err
        assert f"pass --recipe {other}" in err and not (tmp_path / "b").exists()
        return
    assert code == 0
    assert run("parity", tmp_path / "b", *source, "--max-new-tokens", 4)[0] == 0


def test_a_file_of_rules_on_a_packed_target(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    """Its groups of 128 divide neither rows of 64 nor rows of 96."""
    target, drafter = pair_dirs("e2b")
    to_mobile(target, tmp_path / "mobile", own_head=True)
    (tmp_path / "my.toml").write_text(
        'rules = [{ match = "target.embed_tokens_per_layer.weight", bits = 4 },'
        ' { match = "target.*per_layer_*", bits = 8 }, { match = "target.*", bits = 4, group = 128 }]'
    )
    source = ["--target", tmp_path / "mobile", "--drafter", drafter]
    assert (
        run("export", *source, "--output", tmp_path / "b", "--recipe", tmp_path / "my.toml", "--no-calibrate")[0] == 0
    )
    assert run("parity", tmp_path / "b", *source, "--max-new-tokens", 4)[0] == 0


def test_a_calibration_of_what_is_left_in_floats(pair_dirs: Pairs, tmp_path: Path) -> None:
    """With a head of its own, whose scales of activations belong to the target's module."""

    def with_head_scale(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.input_activation_scale"] = torch.tensor(0.05)

    pair = mobile_pair(pair_dirs, tmp_path, own_head=True, activations=True, change=with_head_scale).with_activations()
    recipe = auto_recipe(pair)[0]
    rule = Rule("target.per_layer_model_projection.weight", Width(4, 32))
    texts = TokenTexts(((2, 7, 40, 3, 99) * 8,), "a text")
    rounded = calibrate(pair, Recipe("r", (rule, *recipe.rules)), Scales(), texts, tmp_path / "steps")
    assert rounded.calibrated is not None
    assert rounded.calibrated.matrices == ("per_layer_model_projection.weight",)


def test_scales_of_modules_in_floats_round_nothing(pair_dirs: Pairs, tmp_path: Path) -> None:
    """As in the reference, which does not convert them."""

    def stray(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}per_layer_model_projection.input_activation_scale"] = torch.tensor(0.5)

    pair = mobile_pair(pair_dirs, tmp_path, activations=True, change=stray).with_activations()
    expected = mobile_reference(tmp_path / "mobile")(TOKENS[None]).logits[0]
    assert (logits_of(pair) - expected).abs().max() < 1e-5


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return apply


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


UP = f"{PREFIX}layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(f"{UP}.weight_scale"), r"up_proj\.weight is packed, but .*weight_scale is missing; restore"),
        (
            _set(f"{UP}.weight", lambda x: x[:, :-1]),
            r"up_proj\.weight has shape \[96, 31\], expected .*\[96, 32\], pack",
        ),
        (_set(f"{UP}.weight_scale", lambda x: x[:-1]), r"weight_scale has shape \[95, 1\], expected 96 rows of scales"),
        (_set(f"{UP}.weight_scale", lambda x: x.int()), r"weight_scale is I32, expected floats"),
        (_set(f"{UP}.weight_scale", lambda x: x * torch.nan), r"weight_scale holds NaN or infinity"),
        (_set(f"{UP}.weight", lambda x: x[:, :0]), r"up_proj\.weight has shape \[96, 0\], expected \[96, 16\], packed"),
        (_set(f"{UP}.input_activation_scale", lambda x: x > 0), r"scale is \[\], expected one number of at least 0"),
        (lambda tensors: tensors.update({"x.k_cache_scale": torch.zeros(1)}), r"unknown tensor x\.k_cache_scale"),
        (
            _set(f"{UP}.input_activation_scale", lambda x: x - 1),
            r"scale is \[-1\.0\], expected one number of at least 0",
        ),
        (
            _set(f"{PREFIX}layers.0.per_layer_input_gate.weight", lambda x: x.view(torch.uint8)),
            r"expected \[8, 16\], pa",
        ),
    ],
)
def test_broken_tensors_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, pair_dirs: Pairs, tmp_path: Path, run: Run
) -> None:
    target, drafter = pair_dirs("e2b")
    mobile, bundle = to_mobile(target, tmp_path / "mobile", change=change), tmp_path / "bundle"
    code, _, err = run("export", "--target", mobile, "--drafter", drafter, "--output", bundle)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not bundle.exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"symmetric": False}, "has symmetric False, expected pack-quantized symmetric integers"),
        ({"type": "float"}, "has type 'float'"),
        ({"num_bits": 7}, "has num_bits 7"),
        ({"actorder": "group"}, "has actorder 'group'"),
    ],
)
def test_other_schemes_of_compressed_tensors(
    weights: dict[str, Any], message: str, pair_dirs: Pairs, tmp_path: Path
) -> None:
    target, drafter = pair_dirs("e2b")
    path = to_compressed_tensors(target, tmp_path / "ct") / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message):
        open_pair(path.parent, drafter)


def test_inspect_counts_the_numbers_that_are_packed(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    """As the plain checkpoint has them, but for the head, which only the packed one stores."""
    target, _ = pair_dirs("e2b")
    to_mobile(target, tmp_path / "mobile", own_head=True, activations=True)
    plain, mobile = (json.loads(run("inspect", path, "--json")[1]) for path in (target, tmp_path / "mobile"))
    published = json.loads(run("inspect", to_published(target, tmp_path / "published"), "--json")[1])
    head = plain["target"]["vocab_size"] * plain["target"]["hidden_size"]
    assert mobile["parameters"] == published["parameters"] + head
    packed_matrices = sum(count for entry in mobile["widths"] for count in entry["matrices"].values())
    assert mobile["tensors_used"] == plain["tensors_used"] + 1 + packed_matrices
    two_bits = next(entry["matrices"] for entry in mobile["widths"] if entry["bits"] == 2)
    assert two_bits["lm_head.weight"] == 1 and two_bits["layers.*.mlp.up_proj.weight"] > 1
    assert "widths" not in plain


@pytest.mark.parametrize("spoil", [lambda scales: -scales, lambda scales: 0 * scales])
def test_scales_of_groups_that_xnnpack_does_not_take_are_refused_first(
    spoil: Callable[[Tensor], Tensor], pair_dirs: Pairs, tmp_path: Path, run: Run
) -> None:
    """ONNX Runtime takes them."""
    target, drafter = pair_dirs("e2b")
    compressed = to_compressed_tensors(target, tmp_path / "ct", change=_set(f"{UP}.weight_scale", spoil))
    source = ["--target", compressed, "--drafter", drafter, "--output", tmp_path / "bundle"]
    code, _, err = run("export", *source, "--backend", "executorch")
    assert code == 2 and "scales of target.layers.0.mlp.up_proj.weight that are negative, zero or no bfloat16" in err
    assert not (tmp_path / "bundle").exists()
    assert run("export", *source)[0] == 0


def test_a_packed_head_is_compared_with_the_embedding_whatever_a_block_holds(
    pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here blocks of 100 rows of the packed one with 30 of the other; the embedding is in floats."""

    def floats(tensors: dict[str, Tensor]) -> None:
        stem = f"{PREFIX}embed_tokens"
        numbers, scales = stored_integers(tensors, stem, 2)
        del tensors[f"{stem}.embedding_quantized"], tensors[f"{stem}.embedding_scale"]
        tensors[f"{stem}.weight"] = numbers * scales

    monkeypatch.setattr("exporter.checkpoint.names.HEAD_BLOCK_ROWS", 30)
    monkeypatch.setattr("exporter.checkpoint.packed.BLOCK_BYTES", 100 * 4 * 64)
    pair = mobile_pair(pair_dirs, tmp_path, change=floats)
    assert pair.target.hidden_size == 64 and pair.head == "embed_tokens.weight"


def test_what_export_says_and_other_commands_refuse(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    target, drafter = pair_dirs("e2b")
    to_mobile(target, tmp_path / "mobile", activations=True)
    source = ["--target", tmp_path / "mobile", "--drafter", drafter]
    code, text, err = run("export", *source, "--output", tmp_path / "bundle", "--json")
    assert (code, json.loads(text)["recipe"], json.loads(text)["calibrated"]) == (0, "auto", [])
    assert "recipe auto: it keeps the integers of the checkpoint" in " ".join(err.split())
    assert "scales of activations; the runtime rounds inputs by their own range instead" in " ".join(err.split())
    assert run("parity", tmp_path / "bundle", *source, "--max-new-tokens", 4)[0] == 0
    code, _, err = run("recipe", *source)
    assert code == 2 and "has integers of its own" in err
    code, _, err = run(
        "export", *source, "--output", tmp_path / "pte", "--activations", "checkpoint", "--backend", "executorch"
    )
    assert code == 2 and "--activations checkpoint needs --backend onnx" in err
    plain = ["--target", target, "--drafter", drafter, "--output", tmp_path / "plain"]
    code, _, err = run("export", *plain, "--activations", "checkpoint")
    assert code == 2 and "has no scales of activations" in err
