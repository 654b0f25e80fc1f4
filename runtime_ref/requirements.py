"""What a bundle needs of its reader: features of the format, and a version of the runtime library."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.text_parts import THOUGHT

FLOAT32, FLOAT16 = "float32", "float16"
HEADS_FIRST = ["num_key_value_heads", "rows", "head_dim"]
TABLES = ("embed_tokens", "embed_tokens_per_layer", "head")


def _buffers(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    buffers: list[dict[str, Any]] = raw["kv"]["buffers"]
    return buffers


def _is_split(table: Mapping[str, Any]) -> bool:
    return any(len(table[part]["parts"]) > 1 for part in ("data", "scales") if part in table)


# Features of this format: the version of gemma-mtp-export that brought each, and whether a manifest uses it. FORMAT.md,
# "Features", says what they mean.
FEATURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "untied-head": ("0.2.0", lambda raw: "head" in raw["tables"]),
    "no-per-layer-embeddings": ("0.2.0", lambda raw: "embed_tokens_per_layer" not in raw["tables"]),
    "split-tables": (
        "0.2.0",
        lambda raw: any(_is_split(raw["tables"].get(name, {})) for name in TABLES),
    ),
    "kv-float16": ("0.2.0", lambda raw: any(buffer["dtype"] == FLOAT16 for buffer in _buffers(raw))),
    "kv-layout": ("0.2.0", lambda raw: any(buffer["layout"] != HEADS_FIRST for buffer in _buffers(raw))),
    "channels": ("0.2.0", lambda raw: bool(raw["tokens"].get("channels", {}).keys() - {THOUGHT})),
}


def required_features(raw: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the manifest's `requires`: each feature that a manifest uses, with the version that brought it.

    Args:
        raw: a manifest of the current format, whose `requires` may be missing.
    """
    return [{"name": name, "since": since} for name, (since, uses) in FEATURES.items() if uses(raw)]


def refuse_unknown_features(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a manifest that requires what this version does not know.

    Args:
        path: of the manifest, for the message.
        raw: the parsed manifest, of which nothing has been checked.

    Raises:
        InputError: a feature is unknown, or `requires` is no list of features.
    """
    requires = raw.get("requires")
    entries = requires if isinstance(requires, list) else [None]
    for entry in entries:
        name, since = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "since"))
        if not (isinstance(name, str) and isinstance(since, str)):
            raise InputError(
                f"{path}: requires is {requires!r:.80}, expected a list of objects with name and since; export it again"
            )
        if name not in FEATURES:
            raise InputError(
                f"{path}: needs the feature {name!r:.60}, which gemma-mtp-export {since:.20} brought and this version"
                " does not have; update it, or export the bundle without that feature"
            )


def require_runtime(bundle: Path, library: str, installed: str, oldest: str | None) -> None:
    """Refuse a runtime library that is older than the oldest one that runs a bundle.

    Args:
        bundle: directory of the bundle, for the message.
        library: name of the library.
        installed: its version.
        oldest: the manifest's `backend.min_runtime`; None if it has none.

    Raises:
        InputError: the library is older.
    """
    if oldest is not None and version_numbers(installed) < version_numbers(oldest):
        raise InputError(f"{bundle}: needs {library} {oldest:.40} or later, {installed} is installed; update it")


def version_numbers(version: str) -> list[int]:
    """Return the numbers that a version begins with, without zeros at the end: [1, 31, 1] for `1.31.1rc2`."""
    digits = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in digits[0].split(".")] if digits else []
    while numbers[-1:] == [0]:
        numbers.pop()
    return numbers
