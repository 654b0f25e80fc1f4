"""Read config.json in either dialect of Gemma 4 checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.modeling.config import LAYER_TYPES, AttentionConfig, DrafterConfig, TextConfig
from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json

# Keys of a text config that do not change what the model computes at inference.
IGNORED_TEXT_KEYS = frozenset(
    """_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id
    expert_intermediate_size id2label initializer_range is_encoder_decoder label2id model_type moe_intermediate_size
    num_experts output_attentions output_hidden_states pad_token_id problem_type return_dict sliding_window_pattern
    top_k_experts torch_dtype transformers_version use_cache _sliding_window_pattern _attn_implementation""".split()
)

# Keys that are accepted with these values only: anything else is another architecture.
FIXED_TEXT_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_k_eq_v": (False, None),
    "enable_moe_block": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, "vision"),
}

_REQUIRED_INTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
)


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint.

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    value = read_json(path, "a Hugging Face checkpoint directory with this file")
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_target_config(directory: Path) -> TextConfig:
    """Read a target's config.json in the published (`gemma4`) or the text-only (`gemma4_text`) dialect.

    Raises:
        InputError: no such file, another `model_type`, or a value this exporter cannot honour.
    """
    path = directory / "config.json"
    raw = read_object(path)
    model_type = raw.get("model_type")
    if model_type == "gemma4":
        text = _text_section(raw, path)
    elif model_type == "gemma4_text":
        text = raw
    else:
        hint = "; this is a drafter, pass it as --drafter" if model_type == "gemma4_assistant" else ""
        raise InputError(f"{path}: model_type is {model_type!r}, expected 'gemma4' or 'gemma4_text'{hint}")
    config = parse_text_config(text, path)
    if not config.hidden_size_per_layer_input:
        raise InputError(
            f"{path}: hidden_size_per_layer_input is 0, but E2B and E4B targets have per-layer embeddings;"
            " pass an E2B or E4B checkpoint"
        )
    if config.vocab_size_per_layer_input < config.vocab_size:
        raise InputError(
            f"{path}: vocab_size_per_layer_input is {config.vocab_size_per_layer_input}, less than vocab_size"
            f" ({config.vocab_size}): some tokens would have no per-layer embedding; correct the file"
        )
    if config.num_kv_shared_layers >= config.num_hidden_layers:
        raise InputError(
            f"{path}: num_kv_shared_layers is {config.num_kv_shared_layers}, expected 0 to"
            f" {config.num_hidden_layers - 1}; a target stores the K/V of at least one layer"
        )
    stored = set(config.layer_types[: config.num_kv_layers])
    if missing := set(config.layer_types) - stored:
        raise InputError(f"{path}: KV-shared layers of type {missing.pop()!r} have no storing layer before them")
    return config


def read_drafter_config(directory: Path) -> DrafterConfig:
    """Read a drafter's config.json (`gemma4_assistant`).

    Raises:
        InputError: no such file, another `model_type`, or a value this exporter cannot honour.
    """
    path = directory / "config.json"
    raw = read_object(path)
    model_type = raw.get("model_type")
    if model_type != "gemma4_assistant":
        hint = "; this is a target, pass it as --target" if model_type in ("gemma4", "gemma4_text") else ""
        raise InputError(f"{path}: model_type is {model_type!r}, expected 'gemma4_assistant'{hint}")
    text = parse_text_config(_text_section(raw, path), path)
    if text.num_kv_shared_layers not in (0, text.num_hidden_layers):
        raise InputError(
            f"{path}: num_kv_shared_layers is {text.num_kv_shared_layers}, expected {text.num_hidden_layers}:"
            " every layer of a drafter reads the target's K/V"
        )
    if text.hidden_size_per_layer_input or text.use_double_wide_mlp:
        raise InputError(f"{path}: a drafter has no per-layer embeddings and no double-wide MLP; check the file")
    return DrafterConfig(
        text=text,
        backbone_hidden_size=_positive_int(raw, "backbone_hidden_size", path, 1536),
        num_centroids=_positive_int(raw, "num_centroids", path, 2048),
        centroid_intermediate_top_k=_positive_int(raw, "centroid_intermediate_top_k", path, 32),
    )


def check_pair(target: TextConfig, drafter: DrafterConfig, drafter_dir: Path) -> None:
    """Refuse a drafter that was made for another target.

    Raises:
        InputError: hidden size, vocabulary, layer types, KV heads or head sizes disagree.
    """
    text = drafter.text
    facts = [
        ("backbone_hidden_size", drafter.backbone_hidden_size, target.hidden_size),
        ("vocab_size", text.vocab_size, target.vocab_size),
    ]
    for layer_type in sorted(set(text.layer_types)):
        if layer_type not in target.layer_types:
            raise InputError(f"{drafter_dir}: the drafter has {layer_type} layers, the target has none")
        ours, theirs = text.attention(layer_type), target.attention(layer_type)
        facts.append((f"{layer_type} num_key_value_heads", ours.num_key_value_heads, theirs.num_key_value_heads))
        facts.append((f"{layer_type} head_dim", ours.head_dim, theirs.head_dim))
    for name, found, expected in facts:
        if found != expected:
            raise InputError(
                f"{drafter_dir}: made for another target: {name} is {found}, the target needs {expected};"
                " pass the drafter that belongs to this target"
            )


def parse_text_config(text: Mapping[str, Any], path: Path) -> TextConfig:
    """Build a TextConfig from a text config in either dialect; unknown keys that are set are an error."""
    for key, allowed in FIXED_TEXT_KEYS.items():
        if key in text and text[key] not in allowed:
            raise InputError(f"{path}: {key} is {text[key]!r}, only {allowed[0]!r} is supported")
    known = IGNORED_TEXT_KEYS | FIXED_TEXT_KEYS.keys() | set(_REQUIRED_INTS) | _OPTIONAL_KEYS
    for key, value in text.items():
        # A null or false value is a feature that is switched off.
        if key not in known and value not in (None, False):
            raise InputError(
                f"{path}: unknown key {key!r} = {value!r}: it may change what the model computes;"
                " update gemma-mtp-export, or remove the key if it does not matter"
            )
    ints = {key: _positive_int(text, key, path) for key in _REQUIRED_INTS}
    layer_types = _layer_types(text, ints["num_hidden_layers"], path)
    sliding, full = (
        _attention_config(text, ints, layer_types, layer_type, path)
        for layer_type in ("sliding_attention", "full_attention")
    )
    softcap = text.get("final_logit_softcapping")
    return TextConfig(
        vocab_size=ints["vocab_size"],
        hidden_size=ints["hidden_size"],
        intermediate_size=ints["intermediate_size"],
        num_hidden_layers=ints["num_hidden_layers"],
        num_attention_heads=ints["num_attention_heads"],
        layer_types=layer_types,
        sliding_attention=sliding,
        full_attention=full,
        sliding_window=ints["sliding_window"],
        rms_norm_eps=_positive_float(text, "rms_norm_eps", path, 1e-6),
        num_kv_shared_layers=_int(text, "num_kv_shared_layers", path, 0),
        use_double_wide_mlp=bool(text.get("use_double_wide_mlp")),
        hidden_size_per_layer_input=_int(text, "hidden_size_per_layer_input", path, 256),
        vocab_size_per_layer_input=_int(text, "vocab_size_per_layer_input", path, 0) or ints["vocab_size"],
        final_logit_softcapping=None if softcap is None else _positive_float(text, "final_logit_softcapping", path),
        max_position_embeddings=_positive_int(text, "max_position_embeddings", path, 131072),
    )


_OPTIONAL_KEYS = frozenset(
    """final_logit_softcapping global_head_dim hidden_size_per_layer_input layer_types max_position_embeddings
    num_global_key_value_heads num_kv_shared_layers per_layer_config rms_norm_eps rope_parameters use_double_wide_mlp
    vocab_size_per_layer_input""".split()
)

_DEFAULT_ROPE: Mapping[str, Mapping[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def _text_section(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise InputError(f"{path}: text_config is missing, expected an object with the decoder's sizes")
    if raw.get("tie_word_embeddings", True) is not True:
        raise InputError(f"{path}: tie_word_embeddings is false, only tied embeddings are supported")
    return text


def _int(raw: Mapping[str, Any], key: str, path: Path, default: int, least: int = 0) -> int:
    found = raw.get(key)
    value = default if found is None else found
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        kind = "a positive integer" if least else "an integer that is not negative"
        raise InputError(f"{path}: {key} is {found!r}, expected {kind}; correct the file")
    return value


def _positive_int(raw: Mapping[str, Any], key: str, path: Path, default: int = 0) -> int:
    return _int(raw, key, path, default, least=1)


def _positive_float(raw: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    found = raw.get(key)
    value = default if found is None else found
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise InputError(f"{path}: {key} is {found!r}, expected a positive number; correct the file")
    return float(value)


def _object(raw: Mapping[str, Any], key: str, path: Path, default: Mapping[str, Any]) -> Mapping[str, Any]:
    value = raw.get(key) or default
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} is {value!r}, expected an object; correct the file")
    return value


def _layer_types(text: Mapping[str, Any], num_layers: int, path: Path) -> tuple[str, ...]:
    # The default pattern and the forced last layer are those of transformers' Gemma4TextConfig.
    found = text.get("layer_types") or [LAYER_TYPES[(i + 1) % 6 == 0] for i in range(num_layers)]
    known = isinstance(found, list) and all(isinstance(kind, str) and kind in LAYER_TYPES for kind in found)
    if not known or len(found) != num_layers:
        raise InputError(
            f"{path}: layer_types is {found!r}, expected a list of num_hidden_layers ({num_layers}) entries of"
            f" {' and '.join(LAYER_TYPES)}; correct the file"
        )
    return (*found[:-1], "full_attention")


def _attention_config(
    text: Mapping[str, Any], ints: Mapping[str, int], layer_types: tuple[str, ...], layer_type: str, path: Path
) -> AttentionConfig:
    """Sizes of one layer type: `per_layer_config` in the text-only dialect, `global_head_dim` in the published one."""
    sizes = {"head_dim": ints["head_dim"], "num_key_value_heads": ints["num_key_value_heads"]}
    if "per_layer_config" in text:
        sizes |= _layer_overrides(text, layer_types, layer_type, path)
    elif layer_type == "full_attention":
        # num_global_key_value_heads counts only with attention_k_eq_v, which is refused above.
        sizes["head_dim"] = _positive_int(text, "global_head_dim", path, 512)
    if ints["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise InputError(
            f"{path}: num_attention_heads ({ints['num_attention_heads']}) is not a multiple of"
            f" num_key_value_heads ({sizes['num_key_value_heads']}); correct the file"
        )
    if sizes["head_dim"] % 2:
        raise InputError(f"{path}: head_dim of {layer_type} is {sizes['head_dim']}, expected an even number")
    rope = _object(_object(text, "rope_parameters", path, _DEFAULT_ROPE), layer_type, path, _DEFAULT_ROPE[layer_type])
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "proportional"):
        raise InputError(f"{path}: rope_type of {layer_type} is {rope_type!r}, expected 'default' or 'proportional'")
    partial = _positive_float(rope, "partial_rotary_factor", path, 1.0)
    if partial > 1:
        raise InputError(f"{path}: partial_rotary_factor of {layer_type} is {partial}, expected at most 1")
    return AttentionConfig(
        **sizes,
        rope_theta=_positive_float(rope, "rope_theta", path),
        rope_type=rope_type,
        partial_rotary_factor=partial,
        rope_factor=_positive_float(rope, "factor", path, 1.0),
    )


def _layer_overrides(
    text: Mapping[str, Any], layer_types: tuple[str, ...], layer_type: str, path: Path
) -> dict[str, int]:
    """Head sizes that `per_layer_config` gives the layers of one type, all alike; keys are zero-padded."""
    overrides = _object(text, "per_layer_config", path, {})
    if not all(key.isdecimal() and isinstance(value, dict) for key, value in overrides.items()):
        raise InputError(f"{path}: per_layer_config is {overrides!r}, expected objects by layer number")
    by_layer = {int(key): value for key, value in overrides.items()}
    of_type = [by_layer.get(i, {}) for i, kind in enumerate(layer_types) if kind == layer_type]
    first = of_type[0] if of_type else {}
    if any(other != first for other in of_type) or first.keys() - {"head_dim", "num_key_value_heads"}:
        raise InputError(
            f"{path}: per_layer_config must give all {layer_type} layers the same head_dim and num_key_value_heads,"
            " and nothing else"
        )
    return {key: _positive_int(first, key, path) for key in first}


def checkpoint_json(directory: Path, name: str) -> dict[str, Any]:
    """An optional JSON file of a checkpoint, empty if it is not there."""
    path = directory / name
    return read_object(path) if path.exists() else {}
