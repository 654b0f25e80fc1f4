"""Folding: the target stays the same to the last bit, and a bundle's 8-bit inputs lose less where channels differ."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.calibration.fold import fold, foldable
from exporter.checkpoint.folding import FOLDING, SITES, folding_bytes, read_folding
from exporter.checkpoint.pair import Pair, open_pair
from exporter.checkpoint.tensors import ScaledReader, row_blocks
from exporter.graphs.parts import graph_parts
from exporter.parity.quality import kl_divergence, logits_after
from exporter.parity.reference import Reference
from exporter.parity.source import open_source
from exporter.parity.stages import run_parity
from exporter.quantization.numbers import quantize
from exporter.quantization.recipes import RECIPES
from exporter.quantization.widths import Width
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST
from tests.exporter.calibration.test_calibrate import random_texts
from tests.exports import MAX_SEQ_LEN

Pairs = Callable[[str], tuple[Path, Path]]


def with_loud_channels(source: tuple[Path, Path], output: Path) -> tuple[Path, Path]:
    """Copy a pair with inputs that are 60 times as large in some channels, and matrices as much smaller there.

    As in trained models, whose norms and MLPs give a few channels large numbers.
    """
    shutil.copytree(source[0], output)
    tensors = load_file(output / "model.safetensors")
    for name, tensor in tensors.items():
        scale = torch.ones(tensor.shape[-1])
        scale[::16] = 60.0
        if "input_layernorm" in name or "pre_feedforward_layernorm" in name:
            tensors[name] = (tensor.float() * scale).to(tensor.dtype)
        if any(end in name for end in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensors[name] = (tensor.float() / scale).to(tensor.dtype)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output, source[1]


def folded(pair: Pair, recipe: str = "int8") -> Pair:
    return fold(pair, foldable(graph_parts(pair, RECIPES[recipe])["target"]), random_texts())


@torch.no_grad()
@pytest.mark.parametrize("name", ["e2b", "e4b", "odd"])
def test_the_target_computes_the_same(name: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    """To the last bit, and no other weights change than those that are said to."""
    pair = open_pair(*with_loud_channels(pair_dirs(name), tmp_path / "t"))
    other = folded(pair)
    assert {site.partition(".")[2].partition(".")[2] for site in other.folding} >= {"input_layernorm.weight"}
    assert {int(e.max()) for e in other.folding.values()} != {0}
    text = random_texts().texts[0]
    kept, changed = (p.load_target() for p in (pair, other))
    assert torch.equal(logits_after(kept, text, len(text)), logits_after(changed, text, len(text)))
    differing = [n for n, p in kept.named_parameters() if not torch.equal(p, changed.get_parameter(n))]
    assert {n.split(".", 2)[-1] for n in differing} <= {*SITES, *(m for ms in SITES.values() for m in ms)}
    assert len(differing) > 8


@torch.no_grad()
@pytest.mark.parametrize(("recipe", "ratio"), [("int8", 0.5), ("int4", 0.97)])
def test_rounded_inputs_lose_less(recipe: str, ratio: float, pair_dirs: Pairs, tmp_path: Path) -> None:
    """With one scale a row, as XNNPACK has; the weights of a recipe have their own error."""
    pair, others = open_pair(*with_loud_channels(pair_dirs("e2b"), tmp_path / "t")), random_texts(4, 50)
    exact = Reference(pair, RECIPES["fp32"]).target()
    expected = torch.cat([logits_after(exact, text, len(text)) for text in others.texts])
    divergences = []
    for rounded in (pair, folded(pair, recipe)):
        target = Reference(rounded, RECIPES[recipe], "executorch").target(int8_activations=True)
        actual = torch.cat([logits_after(target, text, len(text)) for text in others.texts])
        divergences.append(float(kl_divergence(expected, actual).mean()))
    assert divergences[1] < ratio * divergences[0]


def test_matrices_on_a_grid_are_left_alone(pair_dirs: Pairs, tmp_path: Path) -> None:
    """Factors for columns would break it: the built-in pair in `int4`, and a grid of 8 bits in float32."""
    demo = open_pair(*pair_dirs("demo"))
    assert not foldable(graph_parts(demo, RECIPES["int4"])["target"])
    assert foldable(graph_parts(demo, RECIPES["int8"])["target"])
    assert not foldable(graph_parts(demo, RECIPES["fp32"])["target"])
    pair = open_pair(*pair_dirs("tiny"))
    sites = foldable(graph_parts(pair, RECIPES["int8"])["target"])
    name = "layers.0.self_attn.k_proj.weight"
    rounded = quantize(pair.target_weights[name](), Width(8)).dequantize()
    on_grid = replace(pair, target_weights={**pair.target_weights, name: lambda: rounded})
    left = foldable(graph_parts(on_grid, RECIPES["int8"])["target"])
    assert set(sites) - set(left) == {"layers.0.input_layernorm.weight"}


def test_blocks_of_a_folded_matrix_are_the_matrix(
    pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns have factors of their own in `up_proj`."""
    monkeypatch.setattr("exporter.checkpoint.tensors.BLOCK_BYTES", 4 * 64 * 5)
    pair = open_pair(*with_loud_channels(pair_dirs("e2b"), tmp_path / "t"))
    norm, up = "layers.0.pre_feedforward_layernorm.weight", "layers.0.mlp.up_proj.weight"
    whole = pair.target_weights[up]()
    rows, columns = (torch.arange(size, dtype=torch.int8) % 5 - 2 for size in whole.shape)
    read = pair.with_folding({norm: columns, up: rows}).target_weights[up]
    expected = whole * 2.0 ** columns.float() / 2.0 ** rows.float().unsqueeze(1)
    blocks = list(row_blocks(read))
    assert len(blocks) > 5
    assert torch.equal(torch.cat(blocks), expected)
    assert torch.equal(read(), expected)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_parity_proves_a_folded_bundle(recipe: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    """The exponents are read from the bundle; with others, weights differ."""
    dirs, path = with_loud_channels(pair_dirs("tiny"), tmp_path / "t"), tmp_path / "b"
    export_bundle(
        open_pair(*dirs), path, ExportOptions("onnx", RECIPES[recipe], MAX_SEQ_LEN, calibration=random_texts())
    )
    source = open_source(path, *dirs)
    assert source.folding
    assert [check for check in run_parity(path, source, [[1, 7, 40]], 8) if not check.passed] == []
    if recipe == "int4":  # whose integers no checkpoint determines
        return
    site = next(iter(source.folding))
    other = {**source.folding, site: source.folding[site] + 1}
    spoilt = replace(open_pair(*dirs).with_folding(other), calibrated=source.calibrated)
    failed = [check.output for check in run_parity(path, spoilt, [[1, 7, 40]], 8) if not check.passed]
    assert "target weights" in failed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "cannot be read"),
        (folding_bytes({"norm.weight": torch.zeros(64, dtype=torch.int8)}), "norm.weight is not of this target"),
        (folding_bytes({"layers.0.input_layernorm.weight": torch.zeros(3, dtype=torch.int8)}), "is not of this target"),
        (folding_bytes({"layers.0.input_layernorm.weight": torch.zeros(64)}), "is not of this target"),
        (
            folding_bytes({"layers.0.input_layernorm.weight": torch.full((64,), -128, dtype=torch.int8)}),
            "has exponents beyond 16",
        ),
    ],
)
def test_what_is_no_folding_is_refused(content: bytes, message: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    shapes = graph_parts(open_pair(*pair_dirs("tiny")), RECIPES["fp32"])["target"].shapes
    with pytest.raises(InputError, match=f"{FOLDING}: .*{message}"):
        read_folding(content, shapes)


@pytest.mark.parametrize("worth_it", [True, False])
def test_the_bundle_tells_of_it(
    worth_it: bool, pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all factors are 1 it has neither the file nor a calibration."""
    if not worth_it:
        monkeypatch.setattr("exporter.calibration.fold.POWERS", {8: 0.0})
    options = ExportOptions("onnx", RECIPES["int8"], MAX_SEQ_LEN, calibration=random_texts())
    export_bundle(open_pair(*with_loud_channels(pair_dirs("tiny"), tmp_path / "t")), tmp_path / "b", options)
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert (FOLDING in manifest["files"], "calibration" in manifest) == (worth_it, worth_it)
    if worth_it:
        assert manifest["calibration"]["matrices"] == []


def test_weights_in_float16_are_folded_without_loss() -> None:
    """Their products need float32; those of bfloat16 do not."""
    exponents = torch.tensor([-16, 5, 0], dtype=torch.int8)
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.tensor([[1.2345e-3, 3000.0, 1.0]]).to(dtype)
        read = ScaledReader(lambda weight=weight: weight, columns=exponents)()
        assert torch.equal(read.double(), weight.double() * 2.0 ** exponents.double())
