"""Unusable checkpoints raise an error of one line that names the offender; each case makes one fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint.pair import open_pair
from runtime_ref.errors import InputError
from tests.pairs import to_published

Directories = tuple[Path, Path]
EMBEDDING = "model.embed_tokens.weight"
CENTROIDS = "masked_embedding.centroids.weight"
ORDERING = "masked_embedding.token_ordering"


@pytest.fixture
def pair(pair_dirs: Callable[[str], Directories], tmp_path: Path) -> Directories:
    for source, name in zip(pair_dirs("e2b"), ("target", "drafter"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "target", tmp_path / "drafter"


def edit_config(directory: Path, section: str | None = None, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


CONFIG_FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no config": (lambda t, d: (t / "config.json").unlink(), r"target/config.json: not found"),
    "config is not JSON": (lambda t, d: (t / "config.json").write_text("{"), r"cannot be read as JSON"),
    "unknown model_type": (
        lambda t, d: edit_config(t, model_type="llama"),
        r"model_type is 'llama', expected 'gemma4'",
    ),
    "target as drafter": (
        lambda t, d: edit_config(d, model_type="gemma4_text"),
        r"this is a target, pass it as --target",
    ),
    "missing size": (
        lambda t, d: edit_config(t, hidden_size=None),
        r"hidden_size is None, expected a positive integer",
    ),
    "mixture of experts": (lambda t, d: edit_config(t, enable_moe_block=True), r"enable_moe_block is True, only False"),
    "malformed layer types": (lambda t, d: edit_config(t, layer_types=[[1]]), r"layer_types is \[\[1\]\]"),
    "epsilon is text": (lambda t, d: edit_config(t, rms_norm_eps="x"), r"rms_norm_eps is 'x', expected a positive"),
    "softcap is zero": (lambda t, d: edit_config(t, final_logit_softcapping=0), r"final_logit_softcapping is 0"),
    "huge size": (lambda t, d: edit_config(t, hidden_size=10**30), r"hidden_size is 1000.*expected a positive integer"),
    "fraction of a layer": (lambda t, d: edit_config(t, num_kv_shared_layers=3.7), r"num_kv_shared_layers is 3.7"),
    "rope is a list": (
        lambda t, d: edit_config(t, rope_parameters=[1]),
        r"rope_parameters is \[1\], expected an object",
    ),
    "rope of a type is a number": (
        lambda t, d: edit_config(t, rope_parameters={"full_attention": 5, "sliding_attention": {"rope_theta": 1e4}}),
        r"full_attention is 5, expected an object",
    ),
    "per-layer sizes by name": (
        lambda t, d: edit_config(t, per_layer_config={"a": {}}),
        r"per_layer_config is .* expected objects by layer number",
    ),
    "per-layer embedding too small": (
        lambda t, d: edit_config(t, vocab_size_per_layer_input=200),
        r"vocab_size_per_layer_input is 200, less than vocab_size",
    ),
    "nested too deep": (lambda t, d: (t / "config.json").write_text("[" * 100_000), r"cannot be read as JSON"),
    "layer count": (
        lambda t, d: edit_config(t, num_hidden_layers=11),
        r"layer_types is .* expected a list of num_hidden_layers \(11\) entries",
    ),
    "other hidden size": (
        lambda t, d: edit_config(d, backbone_hidden_size=65),
        r"made for another target: backbone_hidden_size is 65, the target needs 64",
    ),
    "other KV heads": (
        lambda t, d: edit_config(d, "text_config", num_key_value_heads=2),
        r"made for another target: \w+ num_key_value_heads is 2, the target needs 1",
    ),
    "other vocabulary": (
        lambda t, d: edit_config(d, "text_config", vocab_size=257),
        r"made for another target: vocab_size is 257, the target needs 256",
    ),
    "end token": (
        lambda t, d: (t / "generation_config.json").write_text('{"eos_token_id": [1, "</s>"]}'),
        r"eos_token_id is '</s>', expected a token id",
    ),
    "more clusters kept than there are": (
        lambda t, d: edit_config(d, centroid_intermediate_top_k=17),
        r"centroid_intermediate_top_k is 17, more than the 16 clusters",
    ),
}

TENSOR_FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing tensor": (
        lambda t, d: edit_tensors(t, lambda x: x.pop("model.layers.2.mlp.up_proj.weight")),
        r"tensor model.layers.2.mlp.up_proj.weight is missing",
    ),
    "extra tensor": (
        lambda t, d: edit_tensors(t, lambda x: x.update({"model.layers.2.mlp.bias": torch.ones(3)})),
        r"unknown tensor model.layers.2.mlp.bias",
    ),
    "extra tensor in the drafter": (
        lambda t, d: edit_tensors(d, lambda x: x.update({"extra": torch.ones(3)})),
        r"drafter/model.safetensors: unknown tensor extra",
    ),
    "misshapen tensor": (
        lambda t, d: edit_tensors(t, lambda x: x.update({"model.norm.weight": torch.ones(63)})),
        r"tensor model.norm.weight has shape \[63\], config.json asks for \[64\]",
    ),
    "quantized tensor": (
        lambda t, d: edit_tensors(t, lambda x: x.update({EMBEDDING: x[EMBEDDING].to(torch.int8)})),
        r"tensor model.embed_tokens.weight is I8, expected one of F32",
    ),
    "truncated file": (lambda t, d: truncate(t / "model.safetensors"), r"not a readable safetensors file"),
    "pickled weights": (lambda t, d: pickle_only(t), r"pytorch_model.bin: pickled weights are refused"),
    "no weights": (lambda t, d: (d / "model.safetensors").unlink(), r"neither model.safetensors nor"),
    "ordering is no permutation": (
        lambda t, d: edit_tensors(d, lambda x: x[ORDERING].__setitem__(0, int(x[ORDERING][1]))),
        r"token_ordering is not a permutation of 0..255",
    ),
    "quantized centroids": (
        lambda t, d: edit_tensors(d, lambda x: x.update({CENTROIDS: x[CENTROIDS].to(torch.int8)})),
        r"tensor masked_embedding.centroids.weight is I8",
    ),
    "half a cluster table": (
        lambda t, d: edit_tensors(d, lambda x: x.pop(ORDERING)),
        r"tensor masked_embedding.token_ordering is missing",
    ),
}


@pytest.mark.parametrize("fault", [*CONFIG_FAULTS, *TENSOR_FAULTS])
def test_fault_is_named_in_one_line(fault: str, pair: Directories) -> None:
    make_fault, message = (CONFIG_FAULTS | TENSOR_FAULTS)[fault]
    open_pair(*pair)  # opens before the fault is made
    make_fault(*pair)
    with pytest.raises(InputError, match=message) as caught:
        open_pair(*pair)
    assert "\n" not in str(caught.value)


def test_shard_named_in_the_index_is_absent(pair: Directories, tmp_path: Path) -> None:
    published = to_published(pair[0], tmp_path / "published")
    open_pair(published, pair[1])
    (published / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003.safetensors: named in .* but absent"):
        open_pair(published, pair[1])


def test_index_that_misplaces_a_tensor(pair: Directories, tmp_path: Path) -> None:
    published = to_published(pair[0], tmp_path / "published")
    path = published / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.language_model.norm.weight"
    index["weight_map"][name] = next(f for f in index["weight_map"].values() if f != index["weight_map"][name])
    path.write_text(json.dumps(index))
    with pytest.raises(
        InputError, match=r"tensor model.language_model.norm.weight is not in this file, where the index says it is"
    ):
        open_pair(published, pair[1])


def test_index_cannot_name_files_of_other_directories(pair: Directories, tmp_path: Path) -> None:
    published = to_published(pair[0], tmp_path / "published")
    path = published / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": "../target/model.safetensors"}}))
    with pytest.raises(InputError, match=r"expected a safetensors file in the same directory"):
        open_pair(published, pair[1])


@pytest.mark.parametrize("weight_map", [{"a": 5}, ["x"], None, {}])
def test_index_with_a_malformed_weight_map(weight_map: object, pair: Directories, tmp_path: Path) -> None:
    published = to_published(pair[0], tmp_path / "published")
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"weight_map"):
        open_pair(published, pair[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, pair: Directories) -> None:
    edit_tensors(pair[0], lambda x: x["model.layers.3.mlp.down_proj.weight"][0].fill_(value))
    opened = open_pair(*pair)
    with pytest.raises(InputError, match=r"tensor model.layers.3.mlp.down_proj.weight holds NaN or infinity"):
        opened.load_target()


def test_dense_head_and_required_clusters(pair_dirs: Callable[[str], Directories]) -> None:
    assert open_pair(*pair_dirs("dense")).table is None
    assert open_pair(*pair_dirs("e2b"), head="dense").table is None
    with pytest.raises(InputError, match=r"has no clusters .* --head checkpoint asks for them"):
        open_pair(*pair_dirs("dense"), head="checkpoint")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_converted_exactly(dtype: torch.dtype, pair: Directories) -> None:
    edit_tensors(pair[0], lambda x: x.update({k: v.to(dtype) for k, v in x.items()}))
    actual = open_pair(*pair).target_weights["norm.weight"]()
    assert actual.dtype == torch.float32
    assert actual.equal(load_file(pair[0] / "model.safetensors")["model.norm.weight"].float())
