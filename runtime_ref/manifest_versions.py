"""Manifests of older formats, rewritten as the current one: readers know one form."""

from collections.abc import Mapping
from typing import Any

from runtime_ref.requirements import FLOAT32, HEADS_FIRST
from runtime_ref.text_parts import THOUGHT

# Measured in docs/decisions/0042-a-bundle-says-what-it-needs.md.
OLDEST_ONNXRUNTIME = "1.25"
TABLES_OF_FORMAT_2 = ("embed_tokens", "embed_tokens_per_layer")


def from_format_2(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of format 2 in the form of format 3.

    Args:
        raw: the manifest, whose form was checked.
    """
    # Without keys that mean something in format 3 and nothing in format 2.
    backend = {key: value for key, value in raw["backend"].items() if key != "min_runtime"}
    tokens = {key: value for key, value in raw["tokens"].items() if key != "channels"}
    oldest = {"onnx": OLDEST_ONNXRUNTIME, "executorch": backend.get("executorch")}.get(backend["name"])
    thoughts = tokens.pop("thoughts", None)
    return {
        **raw,
        "format_version": 3,
        "requires": [],
        "backend": {**backend, **({"min_runtime": oldest} if oldest else {})},
        "tables": {name: _table(raw["tables"][name], raw["target"]["vocab_size"]) for name in TABLES_OF_FORMAT_2},
        "tokens": {**tokens, **({"channels": {THOUGHT: thoughts}} if thoughts else {})},
        "kv": {
            **{key: value for key, value in raw["kv"].items() if key not in ("dtype", "layout")},
            "buffers": [{**buffer, "dtype": FLOAT32, "layout": HEADS_FIRST} for buffer in raw["kv"]["buffers"]],
        },
        "source": {model: {"files": raw["source"][model]} for model in ("target", "drafter")},
    }


def _table(entry: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A table's entry, whose data and scales were one place each."""
    parts = {}
    for name in ("data", "scales"):
        if name in entry:
            place = dict(entry[name])
            dtype = {"dtype": place.pop("dtype")} if "dtype" in place else {}
            parts[name] = {**dtype, "parts": [{**place, "rows": rows}]}
    return {**entry, **parts}
