"""Pairs with random weights: their values and sizes, what reads them, and refused outputs."""

import json
import shutil
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonschema import validate
from safetensors.torch import load_file

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.cli.schemas import document_schema
from exporter.demo import synthetic, synthetic_forms
from exporter.demo.sizes import E2B, E4B, FULL, SLIDING, drafter_of
from exporter.demo.synthetic import MARKER, SyntheticPair
from exporter.modeling.config import DrafterConfig
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target
from exporter.modeling.weights import parameter_shapes
from exporter.quantization.recipes import RECIPES
from exporter.terminal import run_command
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.errors import InputError
from runtime_ref.stats import Stats
from tests.pairs import load_reference

TARGET = replace(
    E2B,
    vocab_size=256,
    vocab_size_per_layer_input=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    layer_types=(SLIDING, FULL) * 2,
    sliding_attention=replace(E2B.sliding_attention, head_dim=16),
    full_attention=replace(E2B.full_attention, head_dim=32),
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    max_position_embeddings=1024,
)
DRAFTER = DrafterConfig(replace(drafter_of(TARGET).text, hidden_size=32, intermediate_size=48), 64, 16, 4)
SHARD_BYTES = 20_000  # less than an embedding has


def write(output: Path, seed: int = 0, **options: Any) -> Path:
    SyntheticPair(TARGET, DRAFTER, seed).write(output, shard_bytes=SHARD_BYTES, **options)
    return output


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("synthetic") / "pair")


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_pair_opens_exports_and_generates(pair: Path, tmp_path: Path) -> None:
    opened = open_pair(pair / "target", pair / "drafter", "checkpoint")
    assert (opened.target, opened.drafter, opened.tokens.eos) == (TARGET, DRAFTER, (1, 106))
    assert len(opened.drafter_checkpoint.entries) == 50
    assert len(opened.target_checkpoint.files) > 3
    export_bundle(opened, tmp_path / "bundle", ExportOptions("onnx", RECIPES["fp32"], max_seq_len=64))
    engine = open_engine(tmp_path / "bundle")
    assert len(list(generate(engine, [5, 6, 7], Options(12, 4), Stats()))) in range(1, 13)


def test_transformers_reads_it(pair: Path) -> None:
    model, assistant = load_reference(pair / "target", pair / "drafter")
    logits = model(torch.arange(3, 40)[None]).logits
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2
    assert assistant.config.num_centroids == DRAFTER.num_centroids


def test_values(pair: Path) -> None:
    """Scales keep states near 1, and no two rows or tensors are equal."""
    tensors = load(pair / "target")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    prefix = "model.language_model."
    for name, std in ("embed_tokens", 64**-0.5), ("embed_tokens_per_layer", 8**-0.5):
        rows = tensors[f"{prefix}{name}.weight"]
        assert rows.float().std() == pytest.approx(std, rel=0.05)
        assert len(rows.unique(dim=0)) == len(rows)
    norms = tensors[f"{prefix}layers.0.self_attn.k_norm.weight"], tensors[f"{prefix}norm.weight"]
    assert [norm.float().mean().item() for norm in norms] == pytest.approx([16**-0.25, 1], rel=0.2)
    first, second = (tensors[f"{prefix}layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_a_table_longer_than_the_values_repeats_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(synthetic_forms, "PERIOD_VALUES", 1009)
    write(tmp_path / "pair")
    rows = load(tmp_path / "pair" / "drafter")["model.embed_tokens.weight"]
    assert rows.numel() > 8 * 1009
    assert len(rows.unique(dim=0)) == len(rows)
    assert torch.equal(rows.flatten()[1009 : 2 * 1009], rows.flatten()[:1009])


def test_the_seed_decides_every_byte(pair: Path, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "again")) == contents(pair)
    assert contents(write(tmp_path / "again", seed=1, force=True)) != contents(pair)


@pytest.mark.parametrize(
    ("target", "target_parameters", "drafter_parameters", "published"),
    [(E2B, 4_628_569_379, 77_731_332, 4.65), (E4B, 7_463_013_418, 78_517_764, 7.52)],
)
def test_parameter_counts(target: Any, target_parameters: int, drafter_parameters: int, published: float) -> None:
    """`published`, in billions, includes the K and V weights of KV-shared layers, which nothing reads."""
    actual = sum(map(prod, parameter_shapes(lambda: Target(target)).values()))
    kv_shared = [target.attention(layer_type) for layer_type in target.layer_types[target.num_kv_layers :]]
    unread = sum(2 * target.hidden_size * sizes.num_key_value_heads * sizes.head_dim for sizes in kv_shared)
    assert (actual, round((actual + unread) / 1e9, 2)) == (target_parameters, published)
    drafter = drafter_of(target)
    shapes = parameter_shapes(lambda: Drafter(drafter, None))
    del shapes["target_embed_tokens.weight"]
    assert sum(map(prod, shapes.values())) + 2048 * 256 == drafter_parameters


def test_too_small_a_disk_is_refused_before_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(InputError, match=r"pair: needs 9.42 GB of disk, 1.00 GB are free; free some space, choose"):
        SyntheticPair(E2B, drafter_of(E2B)).write(tmp_path / "deep" / "pair")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("foreign", ["target/notes.txt", "notes.txt", None])
def test_only_synthetic_pairs_are_replaced(foreign: str | None, pair: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pair, tmp_path / "pair")
    with pytest.raises(InputError, match=r"exists already; choose another --output, or pass --force"):
        write(copy)
    if foreign is None:
        (copy / MARKER).unlink()
    else:
        (copy / foreign).write_text("precious")
    with pytest.raises(InputError, match=r"is not a synthetic pair, so it will not be replaced"):
        write(copy, force=True)


def test_the_command_prints_its_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SyntheticPair, "write", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["synthetic", "--size", "e2b", "--output", str(tmp_path / "pair"), "--json"])
    run_command(synthetic.synthetic)
    validate(json.loads(capsys.readouterr().out), document_schema("synthetic", strict=True))


@pytest.mark.parametrize("arguments", [["--size", "e3b", "--output", "x"], ["--size", "e2b", "--output", "."]])
def test_the_command_refuses_in_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["synthetic", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_command(synthetic.synthetic)
    assert len(capsys.readouterr().err.splitlines()) == 1
