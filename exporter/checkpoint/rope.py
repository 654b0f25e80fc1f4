"""Read the rotary embedding of each layer type from a config.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.checkpoint.values import json_object, positive_float
from exporter.modeling.config import LAYER_TYPES
from runtime_ref.errors import InputError

# What transformers' `Gemma4TextConfig` takes without rope_parameters.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

# Keys that each type is computed from; another one would have to say something else, so it is refused.
KEYS = {
    "default": frozenset(("rope_theta",)),
    "proportional": frozenset(("rope_theta", "partial_rotary_factor", "factor")),
}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1,), "factor": (1,), "attention_factor": (1,)}


def rope_fields(text: Mapping[str, Any], layer_types: Sequence[str], layer_type: str, path: Path) -> dict[str, Any]:
    """Return the fields of an `AttentionConfig` that describe the rotary embedding of one layer type.

    Args:
        text: the JSON object with the decoder's sizes.
        layer_types: type of each layer.
        layer_type: one of `LAYER_TYPES`.
        path: the file, which messages name.

    Raises:
        InputError: rope_parameters are not objects by layer type, or say something that is not supported.
    """
    by_type = json_object(text, "rope_parameters", path, DEFAULTS)
    if not by_type.keys() & {*LAYER_TYPES}:
        raise InputError(
            f"{path}: rope_parameters is {dict(by_type)!r:.80}, expected an object for each layer type"
            f" ({', '.join(LAYER_TYPES)}); correct the file"
        )
    if other := by_type.keys() - {*LAYER_TYPES}:
        raise InputError(
            f"{path}: rope_parameters has {sorted(other)[0]!r} beside the layer types, expected inside their objects;"
            " correct the file"
        )
    if by_type.get(layer_type) is None and layer_type in layer_types:
        raise InputError(f"{path}: rope_parameters lacks {layer_type}, which layers have; correct the file")
    rope = json_object(by_type, layer_type, path, DEFAULTS[layer_type])
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in KEYS:
        raise InputError(
            f"{path}: rope_type of {layer_type} is {rope_type!r:.60}, expected 'default' or 'proportional'; pass an E2B"
            " or E4B checkpoint"
        )
    for key, value in rope.items():
        if key not in KEYS[rope_type] | {"rope_type", "type"} and value not in (None, *NEUTRAL.get(key, ())):
            raise InputError(
                f"{path}: {key} of {layer_type} is {value!r:.60}, which rope_type {rope_type!r} does not read; correct"
                " the file"
            )
    fields = {"rope_type": rope_type, "rope_theta": positive_float(rope, "rope_theta", path)}
    if rope_type == "default":
        return fields
    partial = positive_float(rope, "partial_rotary_factor", path, 1.0)
    if partial > 1:
        raise InputError(
            f"{path}: partial_rotary_factor of {layer_type} is {partial}, expected at most 1; correct the file"
        )
    return {**fields, "partial_rotary_factor": partial, "rope_factor": positive_float(rope, "factor", path, 1.0)}
