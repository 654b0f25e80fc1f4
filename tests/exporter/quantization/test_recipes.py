"""Quantized bundles: their weights, their quality, and that weights on a grid are exported without error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.graphs.onnx import stored_weights
from exporter.parity.quality import measure_quality
from exporter.parity.stages import run_parity
from exporter.quantization.recipes import RECIPES
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, read_manifest
from runtime_ref.tokenizer import TextTokenizer
from tests.exports import LOW_BIT_SHAPES, MAX_SEQ_LEN

Pairs = Callable[[str], tuple[Path, Path]]
Bundle = Callable[..., Path]


def test_int4_keeps_the_built_in_pairs_choices(
    bundle: Bundle, pair_dirs: Pairs, documents: tuple[list[str], list[str]]
) -> None:
    """At least 97 % of the chosen tokens are the same, on texts that the pair was not trained on.

    The pair's weights lie on the grids of this recipe.
    """
    path = bundle("demo", "onnx", "int4")
    engine = load_engine(path, read_manifest(path), threads=1)
    tokenizer = TextTokenizer(path, engine.manifest)
    prompts = [tokenizer.encode(text)[:60] for text in documents[1][:9]]
    quality = measure_quality(engine, open_pair(*pair_dirs("demo")), prompts, 12)
    assert quality.whole.positions > 400
    assert quality.whole.agreement >= 0.97
    assert quality.sqnr_db > 35


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [*(("onnx", name) for name in RECIPES if name != "fp32"), ("executorch", "int8"), ("executorch", "int4")],
)
def test_parity_passes_and_measures_a_recipes_quality(
    backend: str, recipe: str, bundle: Bundle, pair_dirs: Pairs
) -> None:
    """`smallest` on ExecuTorch is lowered once, calibrated: `test_parity_proves_a_calibrated_bundle`."""
    name = LOW_BIT_SHAPES.get((backend, recipe), "e2b")
    checks = run_parity(bundle(name, backend, recipe), open_pair(*pair_dirs(name)), [[5], list(range(3, 40))], 12)
    assert [check for check in checks if not check.passed] == []
    assert [c.output.partition(" ")[0] for c in checks if c.stage == "recipe"] == [
        "logits",
        "choices",
        "tokens",
        "drafts",
    ]


def test_a_recipes_quality_is_that_of_a_fresh_engine(bundle: Bundle, pair_dirs: Pairs) -> None:
    """On a text that outgrows the sliding buffers, after the check that runs the target with a dense head's cache."""
    path, pair = bundle("e2b", "onnx", "int4"), open_pair(*pair_dirs("e2b"))
    manifest = read_manifest(path)
    prompts = [np.random.default_rng(0).integers(0, manifest.vocab_size, manifest.limits["window_rows"] + 60).tolist()]
    quality = measure_quality(load_engine(path, manifest, threads=1), pair, prompts, 4)
    details = {check.output: check.detail for check in run_parity(path, pair, prompts, 4)}
    assert pair.two_stage is not None
    assert details["logits against fp32"] == f"SQNR {quality.sqnr_db:.1f} dB"
    assert details["choices against fp32"] == f"{quality.whole.agreement:.1%} of {quality.whole.positions} top-1 equal"


@pytest.mark.parametrize("file", ["target.weights", "drafter.weights", "per_layer.table"])
def test_parity_sees_one_changed_number(file: str, bundle: Bundle, pair_dirs: Pairs, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle("e2b", "onnx", "int4"), tmp_path / "broken"))
    content = bytearray((broken / file).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / file).write_bytes(content)
    failed = {check.stage for check in run_parity(broken, open_pair(*pair_dirs("e2b")), [[5]], 2) if not check.passed}
    assert {"files", "weights"} <= failed


def test_a_trained_grid_survives_an_export(pair_dirs: Pairs, tmp_path: Path) -> None:
    """An int4 bundle of a checkpoint on a 4-bit grid, groups of 32 with scales of either sign, has the same weights."""
    source = Path(shutil.copytree(pair_dirs("e2b")[0], tmp_path / "target"))
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and "per_layer" not in name:
            numbers = torch.randint(-8, 8, (len(tensor), tensor.shape[1] // 32, 32), generator=generator)
            scales = (torch.randn(numbers.shape[:2], generator=generator) * tensor.shape[1] ** -0.5 / 8).half().float()
            tensors[name] = (numbers * scales.unsqueeze(2)).view(tensor.shape)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = ExportOptions("onnx", RECIPES["int4"], max_seq_len=MAX_SEQ_LEN)
    export_bundle(open_pair(source, pair_dirs("e2b")[1]), tmp_path / "b", options)
    manifest = read_manifest(tmp_path / "b")
    table = load_engine(tmp_path / "b", manifest, threads=1).tables["embed_tokens"]
    expected = tensors["model.embed_tokens.weight"].numpy()
    assert np.array_equal(table[range(len(expected))], expected)
    stored = stored_weights(tmp_path / "b" / "target.onnx")
    name = "layers.0.mlp.down_proj.weight"
    packed, stored_scales = stored[name].numpy(), stored[f"{name}.scales"].numpy()
    stored_numbers = np.stack((packed & 15, packed >> 4), -1).reshape(*stored_scales.shape, 32).astype(np.float32) - 8
    assert np.array_equal(
        (stored_numbers * stored_scales[..., None]).reshape(len(packed), -1), tensors[f"model.{name}"].numpy()
    )


def shorten(table: dict, rows: int) -> None:
    table["rows"] = table["data"]["parts"][0]["rows"] = table["scales"]["parts"][0]["rows"] = rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.update(encoding="uint5"), "uint5"),
        (lambda t: t["data"]["parts"][0].update(offset=10**9), "tables are malformed"),
        (lambda t: t.pop("scales"), "tables are malformed"),
        (lambda t: t["data"]["parts"][0].update(file="../manifest.json"), "is not in files"),
        (lambda t: t.update(columns="x"), "columns is 'x', expected a whole number"),
        (lambda t: t.update(group_size=10**30), "group_size is 1000"),
        (lambda t: t.update(group_size=0), "tables are malformed"),
        (lambda t: t.update(columns=7), "is not as wide as hidden_size"),
        (lambda t: t["data"]["parts"][0].update(rows=7), "the parts of table embed_tokens do not have its rows"),
        (lambda t: t["scales"].update(parts=[]), "the parts of table embed_tokens do not have its rows"),
        (lambda t: shorten(t, 7), "does not have a row for each token"),
    ],
    ids=[
        "encoding",
        "offset",
        "no scales",
        "file",
        "columns",
        "groups",
        "no groups",
        "width",
        "rows of a part",
        "no parts",
        "rows",
    ],
)
def test_malformed_tables_are_one_line(
    change: Callable[[dict], object], reason: str, bundle: Bundle, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(bundle("e2b", "onnx", "int4"), tmp_path / "broken"))
    manifest = json.loads((broken / MANIFEST).read_text())
    change(manifest["tables"]["embed_tokens"])
    (broken / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=reason) as caught:
        load_engine(broken, read_manifest(broken), threads=1)
    assert "\n" not in str(caught.value)
