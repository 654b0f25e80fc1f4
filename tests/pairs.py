"""Tiny seeded pairs, made with the reference implementation (transformers) and saved in both published dialects."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.utils import logging

logging.disable_progress_bar()  # a test that reads standard error may be the first to need a pair

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Shape:
    """Sizes of a pair.

    Attributes:
        layer_types: type of each layer of the target.
        shared: number of KV-shared layers of the target.
        vocab: tokens of the vocabulary.
        hidden: hidden size of the target.
        inner: MLP size of the target.
        heads: attention heads.
        kv_heads: KV heads.
        head_dim: head dim of sliding layers.
        full_head_dim: head dim of full layers.
        window: tokens that sliding layers see.
        double_wide: whether the MLP of KV-shared layers has twice the size.
        ple: numbers of a token and layer in the per-layer embeddings.
        softcap: softcap of the target's logits, or None.
        clusters: clusters of the drafter's head, or None for a dense head.
        top_k: clusters that the first stage keeps.
        drafter: hidden size and MLP size of the drafter.
        drafter_layers: type of each layer of the drafter.
    """

    layer_types: tuple[str, ...]
    shared: int
    vocab: int = 256
    hidden: int = 64
    inner: int = 96
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 16
    full_head_dim: int = 32
    window: int = 16
    double_wide: bool = False
    ple: int = 8
    softcap: float | None = 30.0
    clusters: int | None = 16
    top_k: int = 4
    drafter: dict[str, int] = field(default_factory=lambda: {"hidden_size": 32, "intermediate_size": 48})
    drafter_layers: tuple[str, ...] = (SLIDING, FULL)


SHAPES = {
    # E2B with as few layers as show its structure: one KV head, double MLP in the KV-shared layers.
    "e2b": Shape((SLIDING, FULL) * 2, shared=2, double_wide=True),
    # E4B likewise: two KV heads, no double MLP; of two sliding layers that store K and V, others read the second.
    "e4b": Shape((SLIDING, SLIDING, FULL, SLIDING, FULL), shared=2, kv_heads=2),
    # No size is a power of two, more layers are KV-shared than not, and there is no softcap.
    "odd": Shape(
        (SLIDING, FULL, SLIDING, SLIDING, FULL),
        shared=3,
        vocab=1000,
        hidden=60,
        inner=100,
        heads=6,
        kv_heads=3,
        head_dim=12,
        full_head_dim=20,
        window=7,
        ple=6,
        softcap=None,
        clusters=40,
        top_k=3,
        drafter={"hidden_size": 36, "intermediate_size": 50},
    ),
    "dense": Shape((SLIDING, FULL) * 2, shared=2, clusters=None),
    # As few layers as there can be, none of them KV-shared: for what does not depend on them.
    "tiny": Shape((SLIDING, FULL), shared=0, drafter_layers=(FULL,)),
}


def target_model(shape: Shape, seed: int = 0) -> Gemma4ForCausalLM:
    """Make a random target of the reference implementation, whose norms and layer scalars are not 1."""
    config = Gemma4TextConfig(
        hidden_size_per_layer_input=shape.ple,
        vocab_size_per_layer_input=shape.vocab,
        num_kv_shared_layers=shape.shared,
        use_double_wide_mlp=shape.double_wide,
        final_logit_softcapping=shape.softcap,
        **_text(shape, shape.layer_types, hidden_size=shape.hidden, intermediate_size=shape.inner),
    )
    return _randomise(Gemma4ForCausalLM(config), seed)


def drafter_model(shape: Shape, seed: int = 1) -> Gemma4AssistantForCausalLM:
    """Make a random drafter of the reference implementation, for `target_model(shape)`."""
    layer_types = shape.drafter_layers
    text = Gemma4TextConfig(
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        num_kv_shared_layers=len(layer_types),
        **_text(shape, layer_types, **shape.drafter),
    )
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=shape.hidden,
        use_ordered_embeddings=shape.clusters is not None,
        num_centroids=shape.clusters or 2048,
        centroid_intermediate_top_k=shape.top_k,
    )
    model = _randomise(Gemma4AssistantForCausalLM(config), seed)
    if shape.clusters is not None:
        model.masked_embedding.token_ordering.copy_(torch.randperm(shape.vocab))
    return model


def save_pair(shape: Shape, directory: Path) -> tuple[Path, Path]:
    """Save target and drafter as transformers does (text-only dialect, float32, one file), and return their paths."""
    target, drafter = directory / "target", directory / "drafter"
    target_model(shape).save_pretrained(target)
    drafter_model(shape).save_pretrained(drafter)
    return target, drafter


def grown(source: Path, output: Path, added: int) -> Path:
    """Add tokens to the end of a target's vocabulary, as transformers does, and make them likely.

    Args:
        source: directory of a target that `save_pair` wrote.
        output: directory to write.
        added: number of tokens.

    Returns:
        `output`.
    """
    torch.manual_seed(0)
    model = Gemma4ForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + added)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[-added:] = 3 * rows.std() * torch.randn(added, rows.shape[1])
    model.save_pretrained(output)
    return output


def to_published(source: Path, output: Path) -> Path:
    """Rewrite a text-only target as Google publishes it: nested config and names, bfloat16 shards, other modalities.

    Args:
        source: directory of a target that `save_pair` wrote.
        output: directory to write.

    Returns:
        `output`.
    """
    output.mkdir(parents=True)
    text = json.loads((source / "config.json").read_text())
    overrides = text.pop("per_layer_config")
    text["global_head_dim"] = next((layer["head_dim"] for layer in overrides.values()), text["head_dim"])
    text["num_global_key_value_heads"] = None
    text["dtype"] = "bfloat16"
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 8},
        "audio_config": {"model_type": "gemma4_audio", "hidden_size": 8},
        "image_token_id": 200,
        "tie_word_embeddings": True,
    }
    (output / "config.json").write_text(json.dumps(config))
    (output / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106], "bos_token_id": 2}))
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor.bfloat16()
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    tensors["model.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(8, 8, dtype=torch.bfloat16)
    tensors["model.audio_tower.layers.0.norm.weight"] = torch.ones(8, dtype=torch.bfloat16)
    tensors["model.embed_vision.embedding_projection.weight"] = torch.ones(8, 8, dtype=torch.bfloat16)
    tensors["model.embed_audio.embedding_projection.weight"] = torch.ones(8, 8, dtype=torch.bfloat16)
    if text["num_kv_shared_layers"]:  # published checkpoints have K and V weights that no layer reads
        last = text["num_hidden_layers"] - 1
        tensors[f"model.language_model.layers.{last}.self_attn.k_proj.weight"] = torch.ones(4, 4, dtype=torch.bfloat16)
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        shard = {name: tensors[name] for name in names[number::3]}
        save_file(shard, output / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    return output


def _text(shape: Shape, layer_types: tuple[str, ...], **sizes: int) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab,
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "global_head_dim": shape.full_head_dim,
        "sliding_window": shape.window,
        **sizes,
    }


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> Any:
    torch.manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("layer_scalar"):
            tensor.uniform_(0.6, 1.2)
        elif "q_norm" in name or "k_norm" in name:
            # Attention scores are not scaled, so the norms must keep them small, as trained ones do. Otherwise softmax
            # becomes argmax and amplifies rounding tenfold, in the reference as well.
            tensor.uniform_(0.5, 1.5).mul_(tensor.numel() ** -0.25)
        elif "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.dim() == 2:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
    return model.eval()


def load_reference(target: Path, drafter: Path) -> tuple[Gemma4ForCausalLM, Gemma4AssistantForCausalLM]:
    """Load target and drafter of either dialect into the reference implementation, in float32."""
    raw = json.loads((target / "config.json").read_text())
    text = raw.get("text_config", raw)
    model = Gemma4ForCausalLM(
        Gemma4TextConfig(**{k: v for k, v in text.items() if k not in ("dtype", "architectures")})
    )
    tensors = {name: t.float() for file in target.glob("*.safetensors") for name, t in load_file(file).items()}
    prefix = "model.language_model." if "text_config" in raw else "model."
    shared = model.config.num_hidden_layers - model.config.num_kv_shared_layers
    state = {
        "model." + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not _unused(name, shared)
    }
    result = model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    assert not result.missing_keys
    assistant = Gemma4AssistantForCausalLM.from_pretrained(drafter, dtype=torch.float32)
    return model.eval(), assistant.eval()


def _unused(name: str, first_shared: int) -> bool:
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
    return layer >= first_shared and parts[-2] in ("k_proj", "v_proj", "k_norm", "v_norm")


def reference_greedy(
    model: Gemma4ForCausalLM,
    prompt: list[int],
    max_new_tokens: int,
    eos: list[int],
    assistant: Gemma4AssistantForCausalLM | None = None,
    num_draft_tokens: int = 4,
) -> tuple[list[int], int]:
    """Generate greedily with the reference implementation.

    Args:
        model: the target.
        prompt: token ids.
        max_new_tokens: maximum number of new tokens.
        eos: ids of end tokens.
        assistant: the drafter, for speculative decoding.
        num_draft_tokens: draft tokens in a round.

    Returns:
        The new tokens, and the number of passes of the target after the prefill.
    """
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    if assistant is not None:
        assistant.generation_config.num_assistant_tokens = num_draft_tokens
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
    hook = model.model.register_forward_hook(count)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        assistant_model=assistant,
    )
    hook.remove()
    return out[0, len(prompt) :].tolist(), passes - 1
