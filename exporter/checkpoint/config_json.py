"""Read config.json of Gemma 4 checkpoints, in the published or the text-only dialect."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.checkpoint.generation_keys import IGNORED_KEYS, READ_KEYS, UNSUPPORTED_KEYS
from exporter.checkpoint.other_forms import READABLE_METHODS, refuse_other_forms
from exporter.checkpoint.reference_keys import DRAFTER_KEYS, TARGET_KEYS, TEXT_KEYS, TEXT_KEYS_OF_CODE
from exporter.checkpoint.rope import rope_fields
from exporter.checkpoint.values import boolean, integer, json_object, positive_float, positive_int, read_object
from exporter.modeling.config import LAYER_TYPES, AttentionConfig, DrafterConfig, TextConfig
from runtime_ref.errors import InputError

# Keys that transformers reads and that do not change what the model computes at inference.
IGNORED_TEXT_KEYS = frozenset(
    """architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_encoder_decoder label2id moe_intermediate_size num_experts output_hidden_states pad_token_id
    problem_type return_dict top_k_experts transformers_version use_cache""".split()
)

# Keys that transformers' base class takes out of a config, and other programs' bookkeeping.
BOOKKEEPING_KEYS = frozenset(
    """model_type torch_dtype _name_or_path name_or_path _commit_hash output_attentions attn_implementation
    _attn_implementation _sliding_window_pattern sliding_window_pattern num_labels expert_intermediate_size
    quantization_config""".split()
)

# Keys that are accepted with these values only; any other value means another architecture.
FIXED_TEXT_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_k_eq_v": (False, None),
    "enable_moe_block": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "is_causal": (True, None),
    "tie_word_embeddings": (True, False, None),  # see `is_tied`
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


def read_target_config(directory: Path) -> TextConfig:
    """Read config.json of a target's directory, in the published (`gemma4`) or the text-only (`gemma4_text`) dialect.

    Raises:
        InputError: no such file, another `model_type`, or a value that is not supported.
    """
    refuse_other_forms(directory, READABLE_METHODS)
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
            f" ({config.vocab_size}), so that some tokens have no per-layer embedding; correct the file"
        )
    if config.num_kv_shared_layers >= config.num_hidden_layers:
        raise InputError(
            f"{path}: num_kv_shared_layers is {config.num_kv_shared_layers}, expected 0 to"
            f" {config.num_hidden_layers - 1}, because at least one layer of a target stores K/V; correct the file"
        )
    stored = set(config.layer_types[: config.num_kv_layers])
    if missing := set(config.layer_types) - stored:
        raise InputError(
            f"{path}: no {missing.pop()} layer stores K/V, expected one for the KV-shared layers of that type;"
            " correct layer_types or num_kv_shared_layers"
        )
    return config


def read_drafter_config(directory: Path) -> DrafterConfig:
    """Read config.json of a drafter's directory (`gemma4_assistant`).

    Raises:
        InputError: no such file, another `model_type`, or a value that is not supported.
    """
    refuse_other_forms(directory)
    path = directory / "config.json"
    raw = read_object(path)
    model_type = raw.get("model_type")
    if model_type != "gemma4_assistant":
        hint = "; this is a target, pass it as --target" if model_type in ("gemma4", "gemma4_text") else ""
        raise InputError(f"{path}: model_type is {model_type!r}, expected 'gemma4_assistant'{hint}")
    text = parse_text_config(_text_section(raw, path), path)
    if text.num_kv_shared_layers not in (0, text.num_hidden_layers):
        raise InputError(
            f"{path}: num_kv_shared_layers is {text.num_kv_shared_layers}, expected {text.num_hidden_layers}, because"
            " every layer of a drafter reads the target's K/V; correct the file"
        )
    if text.hidden_size_per_layer_input or text.use_double_wide_mlp:
        raise InputError(
            f"{path}: hidden_size_per_layer_input is {text.hidden_size_per_layer_input} and use_double_wide_mlp is"
            f" {text.use_double_wide_mlp}, expected 0 and False for a drafter; correct the file"
        )
    return DrafterConfig(
        text=text,
        backbone_hidden_size=positive_int(raw, "backbone_hidden_size", path, 1536),
        num_centroids=positive_int(raw, "num_centroids", path, 2048),
        centroid_intermediate_top_k=positive_int(raw, "centroid_intermediate_top_k", path, 32),
    )


def check_pair(target: TextConfig, drafter: DrafterConfig, drafter_dir: Path) -> None:
    """Refuse a drafter that was made for another target.

    Args:
        target: config of the target.
        drafter: config of the drafter.
        drafter_dir: the drafter's directory, which messages name.

    Raises:
        InputError: hidden sizes, layer types, numbers of KV heads or head sizes differ, or the drafter's vocabulary is
            the larger one. That of a target may have grown at its end: the drafter never drafts what it lacks.
    """
    text = drafter.text
    sizes = [("backbone_hidden_size", drafter.backbone_hidden_size, target.hidden_size)]
    if text.vocab_size > target.vocab_size:
        sizes.append(("vocab_size", text.vocab_size, target.vocab_size))
    for layer_type in sorted(set(text.layer_types)):
        if layer_type not in target.layer_types:
            raise InputError(
                f"{drafter_dir}: made for another target: it has {layer_type} layers, the target has none;"
                " pass the drafter that belongs to this target"
            )
        actual, expected = text.attention(layer_type), target.attention(layer_type)
        sizes.append((f"{layer_type} num_key_value_heads", actual.num_key_value_heads, expected.num_key_value_heads))
        sizes.append((f"{layer_type} head_dim", actual.head_dim, expected.head_dim))
    for name, drafter_size, target_size in sizes:
        if drafter_size != target_size:
            raise InputError(
                f"{drafter_dir}: made for another target: {name} is {drafter_size}, the target needs {target_size};"
                " pass the drafter that belongs to this target"
            )


def vocabulary_notes(target: TextConfig, drafter: DrafterConfig, drafter_dir: Path) -> list[str]:
    """Return a line if the target has tokens that its drafter lacks; the arguments are those of `check_pair`."""
    added = target.vocab_size - drafter.text.vocab_size
    if not added:
        return []
    return [
        f"{drafter_dir}: has no rows for the last {added} tokens of the target, so they are never drafted, only"
        " verified; `doctor` says how often that ends a round"
    ]


def parse_text_config(text: Mapping[str, Any], path: Path) -> TextConfig:
    """Build a TextConfig from the text section of a config.json, in either dialect.

    Args:
        text: the JSON object with the decoder's sizes.
        path: the file, which messages name.

    Raises:
        InputError: a key is unknown and set, a required one is missing, or a value is not supported.
    """
    for key, allowed in FIXED_TEXT_KEYS.items():
        # Types are compared too: 1 equals True, but transformers takes only a boolean.
        if key in text and not any(type(text[key]) is type(value) and text[key] == value for value in allowed):
            raise InputError(
                f"{path}: {key} is {text[key]!r}, only {allowed[0]!r} is supported; pass an E2B or E4B checkpoint"
            )
    known = IGNORED_TEXT_KEYS | FIXED_TEXT_KEYS.keys() | set(_REQUIRED_INTS) | _OPTIONAL_KEYS
    for key in sorted((TEXT_KEYS | TEXT_KEYS_OF_CODE) - known):
        if text.get(key) is not None and text[key] is not False:  # these switch a feature off
            raise InputError(
                f"{path}: {key} is {text[key]!r:.60}, a key that transformers reads and this exporter does not;"
                " update gemma-mtp-export, or remove the key if it does not matter"
            )
    ints = {key: positive_int(text, key, path) for key in _REQUIRED_INTS}
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
        rms_norm_eps=positive_float(text, "rms_norm_eps", path, 1e-6),
        num_kv_shared_layers=integer(text, "num_kv_shared_layers", path, 0),
        use_double_wide_mlp=boolean(text, "use_double_wide_mlp", path, False),
        hidden_size_per_layer_input=integer(text, "hidden_size_per_layer_input", path, 256),
        vocab_size_per_layer_input=integer(text, "vocab_size_per_layer_input", path, 0) or ints["vocab_size"],
        final_logit_softcapping=None if softcap is None else positive_float(text, "final_logit_softcapping", path),
        max_position_embeddings=positive_int(text, "max_position_embeddings", path, 131072),
    )


_OPTIONAL_KEYS = frozenset(
    """final_logit_softcapping global_head_dim hidden_size_per_layer_input layer_types max_position_embeddings
    num_global_key_value_heads num_kv_shared_layers per_layer_config rms_norm_eps rope_parameters use_double_wide_mlp
    vocab_size_per_layer_input""".split()
)


def _text_section(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise InputError(
            f"{path}: text_config is missing, expected an object with the decoder's sizes; correct the file"
        )
    return text


def _layer_types(text: Mapping[str, Any], num_layers: int, path: Path) -> tuple[str, ...]:
    # The default pattern and the forced last layer are those of transformers' Gemma4TextConfig.
    types = text.get("layer_types") or [LAYER_TYPES[(i + 1) % 6 == 0] for i in range(num_layers)]
    known = isinstance(types, list) and all(isinstance(name, str) and name in LAYER_TYPES for name in types)
    if not known or len(types) != num_layers:
        raise InputError(
            f"{path}: layer_types is {types!r}, expected a list of num_hidden_layers ({num_layers}) entries of"
            f" {' and '.join(LAYER_TYPES)}; correct the file"
        )
    return (*types[:-1], "full_attention")


def _attention_config(
    text: Mapping[str, Any], ints: Mapping[str, int], layer_types: tuple[str, ...], layer_type: str, path: Path
) -> AttentionConfig:
    """Sizes of one layer type, from `per_layer_config` (text-only dialect) or `global_head_dim` (published dialect)."""
    sizes = {"head_dim": ints["head_dim"], "num_key_value_heads": ints["num_key_value_heads"]}
    if "per_layer_config" in text:
        sizes |= _layer_overrides(text, layer_types, layer_type, path)
    elif layer_type == "full_attention":
        # num_global_key_value_heads counts only with attention_k_eq_v, which FIXED_TEXT_KEYS refuses.
        sizes["head_dim"] = positive_int(text, "global_head_dim", path, 512)
    if ints["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise InputError(
            f"{path}: num_attention_heads ({ints['num_attention_heads']}) is not a multiple of"
            f" num_key_value_heads ({sizes['num_key_value_heads']}); correct the file"
        )
    if sizes["head_dim"] % 2:
        raise InputError(
            f"{path}: head_dim of {layer_type} is {sizes['head_dim']}, expected an even number; correct the file"
        )
    fields: dict[str, Any] = {**sizes, **rope_fields(text, layer_types, layer_type, path)}
    return AttentionConfig(**fields)


def _layer_overrides(
    text: Mapping[str, Any], layer_types: tuple[str, ...], layer_type: str, path: Path
) -> dict[str, int]:
    """Head sizes of the layers of one type in `per_layer_config`, which must be equal; keys are zero-padded."""
    overrides = json_object(text, "per_layer_config", path, {})
    if not all(key.isdecimal() and isinstance(value, dict) for key, value in overrides.items()):
        raise InputError(
            f"{path}: per_layer_config is {overrides!r}, expected objects by layer number; correct the file"
        )
    by_layer = {int(key): value for key, value in overrides.items()}
    of_type = [by_layer.get(i, {}) for i, name in enumerate(layer_types) if name == layer_type]
    first = of_type[0] if of_type else {}
    if any(other != first for other in of_type) or first.keys() - {"head_dim", "num_key_value_heads"}:
        raise InputError(
            f"{path}: per_layer_config gives {layer_type} layers different sizes or other keys, expected the same"
            " head_dim and num_key_value_heads for all, and nothing else; correct the file"
        )
    return {key: positive_int(first, key, path) for key in first}


def is_tied(directory: Path) -> bool:
    """Return whether config.json says that the head's weight is the embedding, as it does without the key."""
    raw = read_object(directory / "config.json")
    return boolean(raw, "tie_word_embeddings", directory / "config.json", True)


def config_notes(directory: Path) -> Iterator[str]:
    """Yield a line for each key of config.json that neither transformers nor this exporter reads.

    Args:
        directory: directory of a target or a drafter whose config was read without an error.
    """
    path = directory / "config.json"
    raw, anywhere = read_object(path), BOOKKEEPING_KEYS | READ_KEYS | UNSUPPORTED_KEYS.keys() | IGNORED_KEYS
    in_text = TEXT_KEYS | TEXT_KEYS_OF_CODE | anywhere
    outside = {"gemma4": TARGET_KEYS, "gemma4_assistant": DRAFTER_KEYS}.get(raw["model_type"])
    sections = {"": (raw, in_text)}
    if outside is not None:
        sections = {"": (raw, outside | anywhere), "text_config.": (raw["text_config"], in_text)}
    for prefix, (section, known) in sections.items():
        for key, value in section.items():
            if key not in known and value is not None and value is not False:
                yield f"{path}: {prefix}{key} is not a key that transformers knows; it is ignored"
