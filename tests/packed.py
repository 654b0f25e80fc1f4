"""Targets in the packed forms that Google publishes, made from the tiny ones, and the reference that reads them.

Packing is written here a second time, number by number, so that the reader is not tested against itself.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.integrations.gemma_quant import QuantizedEmbedding, replace_with_quant_layers
from transformers.utils.quantization_config import GemmaQuantizationConfig

from tests.pairs import to_published

PREFIX = "model.language_model."
EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer")
# As E2B's, but for the layers whose MLP has 4 bits. The first pattern that matches decides.
BITS = {
    r"^lm_head$": 2,
    r"language_model\.embed_tokens$": 2,
    r"language_model\.embed_tokens_per_layer$": 4,
    r"language_model\.layers\.[0-1]\.mlp\.": 4,
    r"language_model\.layers\.\d+\.mlp\.": 2,
    r"per_layer_input_gate$": 8,
    r"per_layer_projection$": 8,
    r"self_attn\.": 4,
}
NOT_CONVERTED = ("per_layer_model_projection",)
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")

Change = Callable[[dict[str, Tensor]], None]


def rounded(weight: Tensor, bits: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Round [rows, columns] to integers [rows, columns] int8 with scales [rows, groups] float32."""
    parts = weight.view(len(weight), groups, -1)
    scales = parts.abs().amax(2, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 0.3)  # no bfloat16
    numbers = (parts / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return numbers.view(weight.shape).to(torch.int8), scales.squeeze(2)


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Pack integers [rows, columns] into bytes, the first number in the lowest bits; 8 bits stay int8."""
    return numbers if bits == 8 else torch.tensor(_packed(numbers.numpy().tobytes(), numbers.shape[1], bits))


@functools.cache  # many tests pack the same matrices
def _packed(numbers: bytes, columns: int, bits: int) -> np.ndarray:
    per_byte, half = 8 // bits, 2 ** (bits - 1)
    rows = []
    for row in np.frombuffer(numbers, np.int8).reshape(-1, columns).tolist():
        padded = [number + half for number in row] + [0] * (-len(row) % per_byte)
        groups = [padded[i : i + per_byte] for i in range(0, len(padded), per_byte)]
        rows.append([sum(number << bits * i for i, number in enumerate(group)) for group in groups])
    return np.array(rows, np.uint8)


def to_mobile(
    source: Path, output: Path, own_head: bool = False, activations: bool = False, change: Change = lambda _: None
) -> Path:
    """Write a target in the mobile form, `quant_method: "gemma"`.

    Args:
        source: directory of a text-only target that `tests.pairs.save_pair` wrote.
        output: directory to write.
        own_head: whether the head differs from the embedding.
        activations: whether matrices have scales for their inputs and outputs.
        change: changes the tensors before they are written.

    Returns:
        `output`.
    """
    to_published(source, output)
    tensors = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    weights = {name: t.float() for name, t in tensors.items() if name.startswith(PREFIX) and t.dim() == 2}
    head = weights[f"{PREFIX}embed_tokens.weight"]
    weights["lm_head.weight"] = head.flip(0) if own_head else head
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(NOT_CONVERTED) or weight.shape == (4, 4):  # the latter is read by no layer
            continue
        bits = next((bits for pattern, bits in BITS.items() if re.search(pattern, module)), 4)
        numbers, scales = rounded(weight, bits, layers if module.endswith("per_layer") else 1)
        tensors.pop(name, None)
        if module.endswith(EMBEDDINGS):
            tensors |= {f"{module}.embedding_quantized": packed(numbers, bits), f"{module}.embedding_scale": scales}
            continue
        tensors |= {f"{module}.weight": packed(numbers, bits), f"{module}.weight_scale": scales}
        for end in ("input_activation_scale", "output_activation_scale"):
            tensors[f"{module}.{end}"] = torch.tensor(0.05 if activations and module != "lm_head" else 0.0)
    for layer in range(layers):
        tensors |= {f"{PREFIX}layers.{layer}.self_attn.{kv}_cache_scale": torch.tensor(0.5) for kv in "kv"}
    settings = {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {pattern: {"num_bits": bits} for pattern, bits in BITS.items()},
        "modules_to_not_convert": [*NOT_CONVERTED, *TOWERS],
    }
    return _rewritten(output, tensors, change, quantization_config=settings, tie_word_embeddings=False)


def to_compressed_tensors(source: Path, output: Path, change: Change = lambda _: None, group_size: int = 32) -> Path:
    """Write a target as compressed-tensors packs it: the layers in 4 bits, all else in bfloat16.

    Args:
        source: directory of a text-only target that `tests.pairs.save_pair` wrote; its matrices divide into groups.
        output: directory to write.
        change: changes the tensors before they are written.
        group_size: numbers that share a scale.

    Returns:
        `output`.
    """
    to_published(source, output)
    tensors = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    indivisible: set[str] = set()
    for name in [
        name for name in tensors if re.search(rf"{re.escape(PREFIX)}layers\..*(proj|projection|gate).weight$", name)
    ]:
        weight, stem = tensors.pop(name).float(), name.removesuffix(".weight")
        if weight.shape[1] % group_size:
            tensors[name] = weight.bfloat16()
            indivisible.add(stem.rpartition(".")[2])
            continue
        # In bfloat16 as published, before rounding, so that the integers are those of the stored scales.
        groups = weight.view(len(weight), -1, group_size)
        scales = (groups.abs().amax(2) / 8).bfloat16()
        numbers = (groups / scales.float()[:, :, None]).round().clamp(-8, 7).view(weight.shape).to(torch.int8)
        tensors[f"{stem}.weight_packed"] = packed(numbers, 4).view(torch.int32)
        tensors |= {f"{stem}.weight_scale": scales, f"{stem}.weight_shape": torch.tensor(weight.shape)}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", *(f"re:.*{module}.*" for module in (*NOT_CONVERTED, *TOWERS, *indivisible))],
    }
    return _rewritten(output, tensors, change, quantization_config=settings)


def _rewritten(output: Path, tensors: dict[str, Tensor], change: Change, **config: Any) -> Path:
    change(tensors)
    for file in output.glob("model*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors")
    raw = json.loads((output / "config.json").read_text()) | config
    (output / "config.json").write_text(json.dumps(raw))
    return output


def mobile_reference(target: Path) -> Gemma4ForCausalLM:
    """Load a target in the mobile form into the reference implementation, in float32."""
    raw = json.loads((target / "config.json").read_text())
    text = {k: v for k, v in raw["text_config"].items() if k not in ("dtype", "architectures")}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**text | {"tie_word_embeddings": False}))
    settings = raw["quantization_config"]
    patterns = {p.replace("language_model", "model"): o for p, o in settings["module_quant_configs"].items()}
    config = GemmaQuantizationConfig(4, True, patterns, settings["modules_to_not_convert"])
    replace_with_quant_layers(model, config, config.modules_to_not_convert)
    state = {_module_name(name): t for name, t in load_file(target / "model.safetensors").items()}
    wanted = model.state_dict().keys()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedEmbedding):  # declared with one scale a row, which transformers 5.24.0 computes
            module.embedding_scale = nn.Parameter(torch.empty(state[f"{name}.embedding_scale"].shape))
    result = model.load_state_dict({name: t for name, t in state.items() if name in wanted}, strict=False)
    assert not result.missing_keys
    return model.float().eval()


def _module_name(name: str) -> str:
    return name.replace(PREFIX, "model.", 1)


def stored_integers(tensors: Mapping[str, Tensor], stem: str, bits: int) -> tuple[Tensor, Tensor]:
    """Unpack what a checkpoint stores of a matrix, number by number: integers [rows, n] and scales [rows, groups]."""
    names = ("weight", "weight_scale"), ("embedding_quantized", "embedding_scale"), ("weight_packed", "weight_scale")
    numbers, scales = next(
        (tensors[f"{stem}.{a}"], tensors[f"{stem}.{b}"]) for a, b in names if f"{stem}.{a}" in tensors
    )
    if numbers.dtype == torch.int8:
        return numbers, scales.float()
    bytes_of_rows = numbers.contiguous().view(torch.uint8).tolist()
    mask, half = 2**bits - 1, 2 ** (bits - 1)
    rows = [[(byte >> shift & mask) - half for byte in row for shift in range(0, 8, bits)] for row in bytes_of_rows]
    return torch.tensor(rows, dtype=torch.int8), scales.float()
