"""LoRA adapters: a target computes with them what it computes after PEFT's `merge_and_unload`."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM

from exporter.checkpoint.adapters import MergedReader
from exporter.checkpoint.pair import Pair, open_pair
from exporter.checkpoint.stored_target import open_target, stored_ops
from exporter.modeling.target import OWN_HEAD, Target, empty_kv
from tests.conftest import Directories, Run
from tests.exporter.checkpoint.forms import edit_json, edit_tensors
from tests.packed import to_mobile
from tests.pairs import to_published

Pairs = Callable[[str], Directories]
TOKENS = torch.tensor([2, 77, 130, 9])
ATTENTION = ["q_proj", "v_proj", "o_proj"]


def base(target: Path) -> Gemma4ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def train(target: Path, output: Path, seed: int = 0, **config: Any) -> Path:
    """Save an adapter with random numbers, as PEFT does after a training."""
    torch.manual_seed(seed)
    model = get_peft_model(base(target), LoraConfig(lora_alpha=16, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(output)  # with the matrix of an embedding or head that has a low rank
    return output


def merged(target: Path, *adapters: Path, stored: torch.dtype = torch.float32) -> Tensor:
    """Logits of the reference, whose weights had a dtype, after PEFT has merged adapters one after another."""
    model = base(target)
    model.load_state_dict({name: tensor.to(stored).float() for name, tensor in model.state_dict().items()})
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model(TOKENS[None]).logits[0]


def logits(target: Target, pair: Pair) -> Tensor:
    return target(TOKENS, torch.tensor([0]), torch.arange(4), empty_kv(pair.target, 8)).logits


def assert_like_peft(pair: Pair, expected: Tensor) -> None:
    """Whole and merged, and in the form in which references and calibrations hold a target."""
    for target in (pair.load_target(), open_target(pair, stored_ops())):
        assert (logits(target, pair) - expected).abs().max() < 1e-5 * expected.abs().max()


CONFIGS: Mapping[str, dict[str, Any]] = {
    "attention": {"r": 4, "target_modules": ATTENTION},
    "all linear layers": {"r": 4, "target_modules": "all-linear"},
    "rank-stabilized": {"r": 9, "use_rslora": True, "target_modules": ATTENTION},
    "patterns of ranks and alphas": {
        "r": 4,
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"layers\.[01]\.self_attn\.o_proj": 8},
        "alpha_pattern": {"model.layers.1.self_attn.v_proj": 3, "q_proj": 32, "layers.1.self_attn.q_proj": 1},
    },
    "some layers": {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    "another start": {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "the embedding, which is the head": {"r": 4, "target_modules": ["embed_tokens"]},
    "the head, which is the embedding": {"r": 4, "target_modules": ["lm_head"]},
    "both": {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
    "the per-layer embeddings": {"r": 4, "target_modules": ["embed_tokens_per_layer", "per_layer_model_projection"]},
    "a new embedding": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "a new head": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "both new": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "both new and tied": {
        "r": 4,
        "target_modules": ATTENTION,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "a new norm": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_as_by_peft(config: dict[str, Any], pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", **config)
    expected = merged(target, adapter)
    assert (logits((plain := open_pair(target, drafter)).load_target(), plain) - expected).abs().max() > 1e-2
    pair = open_pair(target, drafter, adapter_dirs=[adapter])
    assert_like_peft(pair, expected)
    own = bool(config.get("modules_to_save")) and not config.get("ensure_weight_tying")
    assert (OWN_HEAD in pair.checkpoint_weights) == (own and config["modules_to_save"] != ["norm"])


HEADS: Mapping[str, dict[str, Any]] = {
    "the embedding": {"r": 4, "target_modules": ["embed_tokens"]},
    "the head": {"r": 4, "target_modules": ["lm_head"]},
    "a new embedding": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "a new one that is to be tied": {
        "r": 4,
        "target_modules": ATTENTION,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "attention": {"r": 4, "target_modules": ATTENTION},
}


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_not_tied(config: dict[str, Any], equal: bool, pair_dirs: Pairs, tmp_path: Path) -> None:
    """It is another matrix even where its numbers are the embedding's."""
    target, drafter = pair_dirs("e2b")
    target = shutil.copytree(target, tmp_path / "target")
    embedding = "model.embed_tokens.weight"
    edit_tensors(
        target, lambda x: x.update({"lm_head.weight": x[embedding].clone() if equal else x[embedding].flip(0)})
    )
    edit_json(target / "config.json", tie_word_embeddings=False)
    adapter = train(target, tmp_path / "adapter", **config)
    pair = open_pair(target, drafter, adapter_dirs=[adapter])
    assert_like_peft(pair, merged(target, adapter))
    assert (OWN_HEAD in pair.checkpoint_weights) == (not equal or config is not HEADS["attention"])


def test_without_the_matrix_that_peft_saves_with_embeddings(pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules=["embed_tokens"])
    assert any(name.endswith("base_layer.weight") for name in load_file(adapter / "adapter_model.safetensors"))
    expected = merged(target, adapter)
    assert_like_peft(open_pair(target, drafter, adapter_dirs=[adapter]), expected)
    edit = _tensors(lambda x: [x.pop(name) for name in list(x) if "base_layer" in name])
    edit(adapter)
    assert_like_peft(open_pair(target, drafter, adapter_dirs=[adapter]), expected)


def test_several_in_order(pair_dirs: Pairs, tmp_path: Path) -> None:
    """The second replaces the embedding that the first has changed, and adds to a matrix that both change."""
    target, drafter = pair_dirs("e2b")
    first = train(target, tmp_path / "1", 1, r=4, target_modules=[*ATTENTION, "embed_tokens"])
    second = train(target, tmp_path / "2", 2, r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens"])
    for adapters in ((first, second), (second, first)):
        pair = open_pair(target, drafter, adapter_dirs=adapters)
        assert_like_peft(pair, merged(target, *adapters))
    with pytest.raises(AssertionError):
        assert_like_peft(pair, merged(target, first, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_half_precision_on_the_published_form(dtype: torch.dtype, pair_dirs: Pairs, tmp_path: Path) -> None:
    """It was trained on the text-only class, whose names the checkpoint has not; some of its matrices nothing reads."""
    target, drafter = pair_dirs("e2b")
    published = to_published(target, tmp_path / "published")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules="all-linear")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    expected = merged(target, adapter, stored=torch.bfloat16)
    for module in ("vision_tower.x", "embed_vision.embedding_projection", "language_model.layers.3.self_attn.k_proj"):
        tensors |= {f"base_model.model.model.{module}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file({name: t.to(dtype) for name, t in tensors.items()}, adapter / "adapter_model.safetensors")
    pair = open_pair(published, drafter, adapter_dirs=[adapter])
    assert_like_peft(pair, expected)
    assert any("6 tensors are for images or sound, which are not exported, or" in line for line in pair.warnings)


def test_rows_and_blocks_of_a_table(pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules=["embed_tokens"])
    read = open_pair(target, drafter, adapter_dirs=[adapter]).target_weights["embed_tokens.weight"]
    assert isinstance(read, MergedReader)
    ids = torch.tensor([5, 200, 5])
    assert torch.allclose(read.rows(ids), read()[ids], atol=1e-6)
    assert torch.allclose(torch.cat(list(read.blocks(100))), read(), atol=1e-6)
    assert [len(block) for block in read.blocks(100)] == [100, 100, 56]


def test_the_whole_way(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    """Exported with an adapter, a bundle holds its digests, and is proven with it and fails without it."""
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules="all-linear")
    source = ["--target", target, "--drafter", drafter]
    code, _, _ = run("export", *source, "--adapter", adapter, "--output", tmp_path / "b", "--recipe", "int4")
    assert code == 0
    (digests,) = json.loads((tmp_path / "b" / "manifest.json").read_text())["source"]["target"]["adapters"]
    assert set(digests["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(run("inspect", tmp_path / "b", "--json")[1])["source"]["target"]["adapters"] == [digests]
    proof = ["parity", tmp_path / "b", *source, "--max-new-tokens", 4]
    assert run(*proof, "--adapter", adapter)[0] == 0
    for adapters in ([], ["--adapter", adapter]):
        edit_json(adapter / "adapter_config.json", lora_alpha=17)
        code, text, _ = run(*proof, *adapters, "--json")
        failed = {check["output"] for check in json.loads(text)["checks"] if not check["passed"]}
        assert code == 1 and {"adapters", "calibrated error"} & failed and len(failed) > 1


def test_another_template_is_told(pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (line,) = [n for n in open_pair(target, drafter, adapter_dirs=[adapter]).warnings if "chat_template" in n]
    assert "differs from the target's, which is bundled" in line


Spoil = Callable[[Path], object]


def _config(**changes: Any) -> Spoil:
    return lambda adapter: edit_json(adapter / "adapter_config.json", **changes)


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def apply(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        path.rename(adapter / "model.safetensors")
        edit_tensors(adapter, change)
        (adapter / "model.safetensors").rename(path)

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_config(use_dora=True), r"has use_dora True, expected a plain LoRA adapter; merge with PEFT"),
        (_config(peft_type="IA3"), r"has peft_type 'IA3'"),
        (_config(trainable_token_indices=[1]), r"has trainable_token_indices \[1\]"),
        (_config(layer_replication=[[0, 2]]), r"has layer_replication"),
        (_config(a_later_kind={"x": 1}), r"has a_later_kind"),
        (_config(init_lora_weights="pissa"), r"has init_lora_weights 'pissa', which changed the model's own weights"),
        (_config(lora_alpha="8"), r"lora_alpha of .*q_proj is '8', expected a number below 1e\+30; correct"),
        (_config(alpha_pattern={"q_proj": 10**400}), r"lora_alpha of .*q_proj is 10+\d*\.\.\.|is 10{50,}, expected"),
        (_config(target_parameters=["x" * 50] * 300), r"has target_parameters \['x{40,60}.*, expected a plain"),
        (_config(r=0), r"r is 0, expected"),
        (_config(r=3), r"has shape \[.*\], expected \[.*\] by its config and the target"),
        (_config(rank_pattern={"(": 3}), r"rank_pattern has '\(', which is no pattern"),
        (_tensors(lambda x: x.pop(f"{Q}A.weight")), r"q_proj.lora_A.weight is missing; restore the adapter"),
        (_tensors(lambda x: x.pop(f"{Q}B.weight")), r"q_proj.lora_B.weight is missing; restore the adapter"),
        (
            _tensors(lambda x: x.update({f"{Q}A.weight": x[f"{Q}A.weight"].int()})),
            r"is I32, expected one of F32.*resto",
        ),
        (
            _tensors(
                lambda x: x.update({f"base_model.model.model.norm.lora_{n}.weight": torch.ones(2, 2) for n in "AB"})
            ),
            r"base_model.model.model.norm.lora_A.weight belongs to no weight of the target that can be merged",
        ),
        (
            _tensors(
                lambda x: x.update(
                    {n.replace("model.layers", "model.language_model.layers"): x[n] + 1 for n in list(x)}
                )
            ),
            r"is a second one for layers.\d.self_attn.q_proj.weight of the target; remove one of the two",
        ),
        (
            _tensors(lambda x: x.update({f"{Q[:-6]}.weight": torch.ones(64, 64)})),
            r"both a low rank and a whole weight, or .* for layers.0.self_attn.q_proj.weight",
        ),
        (
            _tensors(lambda x: x.update({f"{Q[:-6].replace('q_', 'o_')}.base_layer.weight": torch.ones(64, 64)})),
            r"or a base without a low rank, for layers.0.self_attn.o_proj.weight",
        ),
        (_tensors(lambda x: x.update({f"{Q}B.weight": x[f"{Q}B.weight"] / 0})), r"makes .*q_proj.weight NaN or infin"),
        (_tensors(lambda x: x.update({f"{Q}B.bias": torch.ones(4)})), r"q_proj.lora_B.bias belongs to no weight"),
        (
            _tensors(lambda x: x.update({n.replace("s.0.", "s.9."): x.pop(n) for n in list(x)})),
            r"layers.9.* belongs to no weight of the target",
        ),
        (lambda a: (a / "adapter_config.json").unlink(), r"has no adapter_config.json; pass the directory of a LoRA"),
        (
            lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
            r"adapter_model.bin: pickled weights are refused",
        ),
        (lambda a: (a / "adapter_model.safetensors").unlink(), r"has neither adapter_model.safetensors nor"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x"), r"is not a readable safetensors file"),
    ],
)
def test_what_is_refused(spoil: Spoil, message: str, pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    spoil(adapter)
    source = ["--target", target, "--drafter", drafter, "--adapter", adapter]
    code, _, err = run("export", *source, "--output", tmp_path / "bundle", "--recipe", "fp32")
    assert code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_packed_targets_take_none(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    target, drafter = pair_dirs("e2b")
    adapter = train(target, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    source = ["--target", to_mobile(target, tmp_path / "mobile"), "--drafter", drafter, "--adapter", adapter]
    code, _, err = run("export", *source, "--output", tmp_path / "bundle")
    assert code == 2 and "as packed integers, to which" in err and "unquantized" in err
