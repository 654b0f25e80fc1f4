"""Forms in which checkpoints come, and what comes of each; as a program it prints docs/compatibility.md."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.packed import to_compressed_tensors, to_mobile
from tests.pairs import to_published

Change = Callable[[Path, Path], object]
EMBEDDING = "model.embed_tokens.weight"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 32169626\n"


@dataclass(frozen=True)
class Form:
    """A form of checkpoint.

    Attributes:
        change: makes it of the directories of a target and a drafter as transformers saves them.
        message: pattern of the refusal; empty if it is exported.
        by_transformers: whether transformers loads it too, so that logits are compared.
        advice: for the page, what a user does with a refused one.
    """

    change: Change
    message: str = ""
    by_transformers: bool = True
    advice: str = ""


def edit_json(file: Path, section: str | None = None, **changes: Any) -> None:
    """Change keys of a JSON file, which is created if it is missing; a value of `...` removes its key."""
    document = json.loads(file.read_text()) if file.exists() else {}
    part = document[section] if section else document
    part.update({key: value for key, value in changes.items() if value is not ...})
    for key in [key for key, value in changes.items() if value is ...]:
        part.pop(key, None)
    file.write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def _config(**changes: Any) -> Change:
    return lambda target, _: edit_json(target / "config.json", **changes)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda target, _: edit_tensors(target, change)


def _renamed(old: str, new: str) -> Change:
    return _tensors(lambda x: [x.update({new + name.removeprefix(old): x.pop(name)}) for name in list(x)])


def _as_dtype(dtype: torch.dtype) -> Change:
    return _tensors(lambda x: x.update({name: tensor.to(dtype) for name, tensor in x.items()}))


def _add(name: str, make: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> Change:
    return _tensors(lambda x: x.update({name: make(x)}))


def _published(target: Path, _: Path) -> None:
    to_published(target, target.with_name("published"))
    shutil.rmtree(target)
    target.with_name("published").rename(target)


def _published_base(target: Path, drafter: Path) -> None:
    _published(target, drafter)
    _merge_shards(target, lambda name: name.removeprefix("model."))


def _published_older(target: Path, drafter: Path) -> None:
    _published(target, drafter)
    _merge_shards(target, lambda name: name.replace("model.language_model.", "language_model.model."))


def _merge_shards(target: Path, rename: Callable[[str], str]) -> None:
    tensors = {k: v for file in target.glob("model-*.safetensors") for k, v in load_file(file).items()}
    for file in target.glob("model*"):
        file.unlink()
    save_file({rename(name): tensor for name, tensor in tensors.items()}, target / "model.safetensors")


def _untied(change: Callable[[torch.Tensor], torch.Tensor], **config: Any) -> Change:
    def apply(target: Path, drafter: Path) -> None:
        _add("lm_head.weight", lambda x: change(x[EMBEDDING]))(target, drafter)
        edit_json(target / "config.json", **config)

    return apply


def _gptq(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        tensors[name.replace(".weight", ".qweight")] = torch.zeros(columns // 8, rows, dtype=torch.int32)


def _float32_scales(tensors: dict[str, torch.Tensor]) -> None:
    """The reference multiplies integers with scales in the dtype of the scales."""
    tensors |= {name: t.float() for name, t in tensors.items() if name.endswith("weight_scale")}


def _packed(write: Callable[..., Path], change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None) -> Change:
    def apply(target: Path, _: Path) -> None:
        packed = write(target, target.with_name("packed"), change=change)
        shutil.rmtree(target)
        packed.rename(target)

    return apply


def _adapter_only(target: Path, _: Path) -> None:
    shutil.rmtree(target)
    target.mkdir()
    edit_json(target / "adapter_config.json", peft_type="LORA", base_model_name_or_path="acme/mini")
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 64)}, target / "adapter_model.safetensors")


def _gguf_only(target: Path, _: Path) -> None:
    shutil.rmtree(target)
    target.mkdir()
    (target / "model.gguf").write_bytes(b"GGUF")


def _write(name: str, content: str) -> Change:
    return lambda target, _: (target / name).write_text(content)


def _dangling(name: str) -> Change:
    def apply(target: Path, _: Path) -> None:
        (target / name).unlink(missing_ok=True)
        (target / name).symlink_to("../blobs/gone")

    return apply


ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def _rope(**changes: Any) -> Change:
    return _config(rope_parameters={name: {**ROPE[name], **changes.get(name, {})} for name in ROPE})


MERGE = "merge it into its base, pass the merged checkpoint"
ADAPTER = "pass its base as `--target`, and it as `--adapter`"
DEQUANTIZE = "pass the unquantized sister, or dequantize it with transformers"

FORMS: Mapping[str, Mapping[str, Form]] = {
    "Layouts and dtypes": {
        "a text-only save of transformers, one file": Form(lambda *_: None),
        "as Google publishes it: nested config, shards, towers": Form(_published),
        "the same, saved from the model without its head": Form(_published_base),
        "the same with names of transformers 4": Form(_published_older, by_transformers=False),
        "a text-only save of the decoder alone (`Gemma4TextModel`)": Form(_renamed("model.", "")),
        "float16": Form(_as_dtype(torch.float16)),
        "float64": Form(_as_dtype(torch.float64)),
        "a mixture of dtypes": Form(
            _tensors(lambda x: x.update({n: t.to(torch.float16) for n, t in x.items() if "mlp" in n}))
        ),
        "other formats beside it (consolidated.safetensors, pytorch_model.bin, a GGUF file)": Form(
            lambda t, d: [
                (t / name).write_bytes(b"another format")
                for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "tf_model.h5")
            ]
        ),
        "shards of an earlier save beside it": Form(
            lambda t, d: (
                (t / "model-00001-of-00002.safetensors").write_bytes(b"an earlier save"),
                edit_json(t / "model.safetensors.index.json", weight_map={"x": "model-00001-of-00002.safetensors"}),
            )
        ),
        "a buffer of rotary frequencies among the tensors": Form(
            _add("model.rotary_emb.full_attention_inv_freq", lambda _: torch.ones(4))
        ),
        "K and V weights of KV-shared layers": Form(
            _add("model.layers.3.self_attn.k_proj.weight", lambda _: torch.ones(4, 4))
        ),
    },
    "The head": {
        "`lm_head.weight` stored, equal to the embedding": Form(_untied(torch.clone)),
        "the same, `tie_word_embeddings` false": Form(_untied(torch.clone, tie_word_embeddings=False)),
        "`lm_head.weight` differs from the embedding, `tie_word_embeddings` false": Form(
            _untied(lambda x: x * 1.5, tie_word_embeddings=False)
        ),
        "one number of it differs": Form(
            _untied(lambda x: x.index_put((torch.tensor(7), torch.tensor(3)), x[7, 3] + 1), tie_word_embeddings=False)
        ),
        "`lm_head.weight` differs, `tie_word_embeddings` true": Form(
            _untied(lambda x: x * 1.5),
            r"tensor lm_head.weight differs from the embedding, but tie_word_embeddings is true",
            advice="correct config.json",
        ),
        "`tie_word_embeddings` false in text_config alone, which transformers does not read": Form(
            lambda t, d: (_published(t, d), edit_json(t / "config.json", "text_config", tie_word_embeddings=False))
        ),
        "`lm_head.weight` alone, as safetensors' `save_model` keeps the first of two names": Form(
            _tensors(lambda x: x.update({"lm_head.weight": x.pop(EMBEDDING)}))
        ),
        "the drafter's `lm_head.weight` alone": Form(
            lambda t, d: edit_tensors(d, lambda x: x.update({"lm_head.weight": x.pop(EMBEDDING)}))
        ),
        "`lm_head.weight` alone, `tie_word_embeddings` false": Form(
            lambda t, d: (
                edit_tensors(t, lambda x: x.update({"lm_head.weight": x.pop(EMBEDDING)})),
                edit_json(t / "config.json", tie_word_embeddings=False),
            ),
            r"tensor model.embed_tokens.weight is missing; restore",
        ),
        "`lm_head.weight` in another dtype, equal to the embedding": Form(
            lambda t, d: (_as_dtype(torch.bfloat16)(t, d), _untied(torch.Tensor.float)(t, d))
        ),
        "`tie_word_embeddings` false without `lm_head.weight`": Form(
            _config(tie_word_embeddings=False),
            r"tie_word_embeddings is false, but tensor lm_head.weight is missing",
            advice="restore the tensor or the config",
        ),
        "the drafter's `lm_head.weight` differs": Form(
            lambda t, d: edit_tensors(d, lambda x: x.update({"lm_head.weight": x[EMBEDDING] * 1.5})),
            r"drafter: tensor lm_head.weight differs",
        ),
    },
    "Keys of config.json": {
        "keys of training tools (`unsloth_fixed`, `cache_implementation`, `auto_map`, ..)": Form(
            _config(unsloth_fixed=True, unsloth_version="2026.7.4", cache_implementation="hybrid", auto_map={"a": "b"})
        ),
        "the same in the published dialect": Form(
            lambda t, d: (
                _published(t, d),
                edit_json(t / "config.json", unsloth_fixed=True, model_name="acme/mini"),
                edit_json(t / "config.json", "text_config", tokenizer_class="GemmaTokenizer"),
            )
        ),
        "`torch_dtype` in place of `dtype`": Form(_config(torch_dtype="float32", dtype=...)),
        "a key that changes the model, such as `attention_k_eq_v`": Form(
            _config(attention_k_eq_v=True), r"attention_k_eq_v is True, only False is supported"
        ),
        "`rope_theta` outside of `rope_parameters`, which transformers does not read": Form(_config(rope_theta=5e5)),
        "`partial_rotary_factor` outside of `rope_parameters`": Form(
            _config(partial_rotary_factor=0.5), r"partial_rotary_factor is 0.5, a key that transformers reads"
        ),
        "`is_causal` false": Form(_config(is_causal=False), r"is_causal is False, only True is supported"),
        "`is_causal` true": Form(_config(is_causal=True)),
        "a stray `text_config` of null in the text-only form": Form(_config(text_config=None), by_transformers=True),
        "text where true or false belongs": Form(
            _config(use_double_wide_mlp="no"), r"use_double_wide_mlp is 'no', expected true or false"
        ),
        "a number where true or false belongs": Form(_config(attention_bias=0), r"attention_bias is 0, only False"),
        "no `rope_parameters`": Form(_config(rope_parameters=None)),
        "`rope_parameters` with `type` in place of `rope_type`": Form(
            _config(
                rope_parameters={
                    "sliding_attention": {"type": "default", "rope_theta": 10_000.0},
                    "full_attention": {"type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
                }
            )
        ),
        "`rope_parameters` in the flat form": Form(
            _config(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
            r"rope_parameters is .*, expected an object for each layer type",
            advice="transformers cannot load it either",
        ),
        "`rope_parameters` of one layer type": Form(
            _config(rope_parameters={"full_attention": ROPE["full_attention"]}),
            r"rope_parameters lacks sliding_attention",
        ),
        "`attention_factor`": Form(
            _rope(full_attention={"attention_factor": 1.3}),
            r"attention_factor of full_attention is 1.3, which rope_type 'proportional' does not read",
        ),
        "`partial_rotary_factor` with `rope_type` default": Form(
            _rope(sliding_attention={"partial_rotary_factor": 0.5}),
            r"partial_rotary_factor of sliding_attention is 0.5, which rope_type 'default' does not read",
        ),
        "`rope_type` yarn, linear, ..": Form(
            _rope(full_attention={"rope_type": "yarn", "factor": 4.0}),
            r"rope_type of full_attention is 'yarn', expected",
        ),
    },
    "Adapters and wrappers": {
        "an adapter alone (PEFT)": Form(_adapter_only, r"an adapter \(LORA\) for acme/mini", advice=ADAPTER),
        "an adapter beside the weights": Form(
            lambda t, d: edit_json(t / "adapter_config.json", peft_type="LORA"), r"holds an adapter", advice=ADAPTER
        ),
        "a PEFT model whose adapters were merged, with PEFT's names": Form(
            _renamed("", "base_model.model."), by_transformers=False
        ),
        "LoRA tensors among the weights": Form(
            _add("model.layers.0.self_attn.q_proj.lora_A.default.weight", lambda _: torch.zeros(8, 64)),
            r"lora_A.default.weight is an adapter's that was not merged",
            advice=MERGE,
        ),
        "modules that PEFT trains as a whole, not merged": Form(
            _add("model.norm.modules_to_save.default.weight", lambda _: torch.zeros(64)),
            r"modules_to_save.default.weight is an adapter's that was not merged",
            advice=MERGE,
        ),
        "saved from `torch.compile`": Form(_renamed("", "_orig_mod."), by_transformers=False),
        "layers compiled one by one": Form(
            _tensors(lambda x: [x.update({re.sub(r"(layers.\d+.)", r"\1_orig_mod.", n): x.pop(n)}) for n in list(x)]),
            by_transformers=False,
        ),
        "saved from DistributedDataParallel, or by DeepSpeed": Form(_renamed("", "module."), by_transformers=False),
        "saved from FSDP, with checkpointed layers": Form(
            lambda t, d: (
                _renamed("model.", "model._fsdp_wrapped_module._checkpoint_wrapped_module.")(t, d),
                _renamed("", "_fsdp_wrapped_module.")(t, d),
            ),
            by_transformers=False,
        ),
        "the student of a distillation, compiled": Form(_renamed("", "student._orig_mod."), by_transformers=False),
        "the drafter, saved from DistributedDataParallel": Form(lambda t, d: _renamed("", "module.")(d, t)),
        "two tensors that become one": Form(
            _add("model.norm._orig_mod.weight", lambda _: torch.zeros(64)),
            r"tensors model.norm(._orig_mod)?.weight and model.norm(._orig_mod)?.weight are both model.norm.weight of",
        ),
        "a teacher beside the student": Form(
            _tensors(lambda x: x.update({f"teacher.{n}": t.clone() for n, t in x.items()})),
            r"unknown tensor teacher.model",
        ),
    },
    "Quantized checkpoints": {
        # transformers declares one scale a row for per-layer embeddings, which have one for each layer.
        "packed for mobile QAT (`quant_method` gemma)": Form(_packed(to_mobile), by_transformers=False),
        "packed by compressed-tensors, 4 bits in groups of 32": Form(_packed(to_compressed_tensors, _float32_scales)),
        **{
            f"`quant_method` {method} without packed tensors": Form(
                _config(quantization_config={"quant_method": method}),
                rf"the checkpoint is quantized, by {method}, but no tensor is packed",
                advice="restore the checkpoint",
            )
            for method in ("gemma", "compressed-tensors")
        },
        **{
            f"`quant_method` {method}": Form(
                _config(quantization_config={"quant_method": method}),
                rf"the checkpoint is quantized, by {method}; pass its unquantized sister",
                advice=DEQUANTIZE,
            )
            for method in ("bitsandbytes", "gptq", "awq", "fp8", "torchao", "hqq")
        },
        "the tensors of GPTQ without `quantization_config`": Form(
            _tensors(_gptq), r"quantized, by GPTQ or AWQ \(tensor .*qweight\)", advice=DEQUANTIZE
        ),
        "the tensors of bitsandbytes": Form(
            _add("model.layers.0.mlp.up_proj.weight.absmax", lambda _: torch.zeros(4, dtype=torch.uint8)),
            r"quantized, by bitsandbytes",
            advice=DEQUANTIZE,
        ),
        "the tensors of compressed-tensors without `quantization_config`": Form(
            _add("model.layers.0.mlp.up_proj.weight_packed", lambda _: torch.zeros(4, dtype=torch.int32)),
            r"quantized, by compressed-tensors",
            advice=DEQUANTIZE,
        ),
        "fp8 weights": Form(
            _tensors(lambda x: x.update({EMBEDDING: x[EMBEDDING].to(torch.float8_e4m3fn)})),
            r"tensor model.embed_tokens.weight is F8_E4M3, expected one of F32",
            advice=DEQUANTIZE,
        ),
        "a GGUF file": Form(_gguf_only, r"model.gguf: a GGUF file", advice="pass what it was converted from"),
        "a pickle (`pytorch_model.bin`)": Form(
            lambda t, d: (t / "model.safetensors").rename(t / "pytorch_model.bin"),
            r"pickled weights are refused",
            advice="convert it to safetensors",
        ),
    },
    "Incomplete downloads": {
        **{
            f"`{name}` is a pointer of Git LFS": Form(
                _write(name, LFS_POINTER), rf"{name}: is a pointer of Git LFS; run `git lfs pull`"
            )
            for name in (
                *("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"),
                *("tokenizer_config.json", "chat_template.jinja"),
            )
        },
        **{
            f"`{name}` is a link whose file is gone": Form(
                _dangling(name), rf"{name}: is a link to .*gone, which is gone; download the file again"
            )
            for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja")
        },
        "`tokenizer.json` is a web page": Form(_write("tokenizer.json", "<!DOCTYPE html><html>"), r"is a web page"),
        "`tokenizer.json` is empty": Form(_write("tokenizer.json", ""), r"is an empty file"),
        "`tokenizer.model` alone": Form(
            _write("tokenizer.model", "x"),
            r"tokenizer.model: a tokenizer in this form alone cannot be bundled",
            advice="save it with transformers, which writes tokenizer.json",
        ),
    },
}


def page() -> str:
    """Return the text of docs/compatibility.md."""
    lines = [
        "# Which checkpoints can be exported",
        "",
        "<!-- `make docs` writes this page from tests/exporter/checkpoint/forms.py; change that, not this page. -->",
        "",
        "Each row is a test: a small random checkpoint is brought into the form, and opened. Where it is exported, its"
        " logits are those of transformers 5.24.0. Where it is refused, one line names the file and says what to do."
        " Keys of config.json and generation_config.json that change nothing here are ignored with a warning.",
        "",
    ]
    for group, forms in FORMS.items():
        lines += [f"## {group}", "", "| checkpoint | result |", "|---|---|"]
        for name, form in forms.items():
            result = "refused" if form.message else "exported"
            result += f": {form.advice}" if form.advice else ""
            result += "; transformers 5.24.0 does not load it" if not form.by_transformers else ""
            lines.append(f"| {name} | {result} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
