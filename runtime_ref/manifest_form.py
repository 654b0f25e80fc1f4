"""The form of a manifest's keys that programs read: which must be there, and what kind of value each holds."""

import re
from collections.abc import Mapping
from typing import Any

MAX_SIZE = 1 << 62  # of a file, in bytes: more cannot be true
MAX_COUNT = 1 << 31
MAX_NUMBER = 1e300
REPETITION_RANGE = (0.01, 100)  # peers take any positive number; far beyond these, float64 would overflow
BESIDE_PLACES = ("before", "after", "")  # where what is said beside calls of tools goes
VERSION = r"[0-9]{1,9}(\.[0-9]{1,9}){0,5}([^0-9.].*)?"

# A form is a type (`object` is any value), the forms of an object's keys (optional ones end in `?`), the one form of a
# list's items, an object with the key `*` for all others, a pair of None and the form of a value that may be null, or a
# function that checks a value and raises ValueError.
Form = Any


def size(value: Any) -> None:
    """Accept a whole number that is not negative."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_SIZE:
        raise ValueError(f"is {value!r:.60}, expected a whole number that is not negative")


def count(value: Any) -> None:
    """Accept a whole number that is not negative, of something that lies in memory."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_COUNT:
        raise ValueError(f"is {value!r:.60}, expected a whole number from 0 to {MAX_COUNT - 1}")


def number(value: Any) -> None:
    """Accept a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MAX_NUMBER:
        raise ValueError(f"is {value!r:.60}, expected a number")


def penalty(value: Any) -> None:
    """Accept a repetition penalty."""
    least, most = REPETITION_RANGE
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"is {value!r:.60}, expected a number from {least} to {most}")


def version(value: Any) -> None:
    """Accept a version that begins with numbers, such as `1.32.0` or `1.5.1a0+cpu`."""
    if not isinstance(value, str) or not re.fullmatch(VERSION, value):
        raise ValueError(f"is {value!r:.60}, expected a version such as 1.32.0")


def two_ids(value: Any) -> None:
    """Accept a list of two token ids."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"is {value!r:.60}, expected two token ids")
    for token in value:
        count(token)


def two_texts(value: Any) -> None:
    """Accept a list of two texts."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise ValueError(f"is {value!r:.60}, expected two texts")


def beside(value: Any) -> None:
    """Accept a place for what is said beside calls of tools."""
    if value not in BESIDE_PLACES:
        raise ValueError(f"is {value!r:.60}, expected before, after or an empty text")


_PORT = {"name": str}
_GRAPH = {"file": str, "inputs": [_PORT], "outputs": [_PORT]}
_PLACE = {"file": str, "offset": size}
_PARTS = [{**_PLACE, "rows": count}]
_ROWS = {"rows": count, "columns": count, "encoding": str, "row_bytes": count, "group_size": count}
TABLE = {**_ROWS, "data": {"parts": _PARTS}, "scales?": {"dtype": str, "parts": _PARTS}}
_TEXT_CONFIG = {
    "vocab_size": count,
    "hidden_size": count,
    "sliding_window": count,
    "num_hidden_layers": count,
    "layer_types": [str],
    "final_logit_softcapping?": (None, number),
}

_TOKENS = {"bos": count, "eos": [count], "pad?": count, "suppressed?": [count], "names?": {"*": str}}
_BUFFER = {"name": str, "layer": count, "layer_type": str, "num_key_value_heads": count, "head_dim": count}
_PART = {"before": str, "after": str, "syntax?": str, "quote?": str}
_FILES = {"*": str}  # sha256 by file name
_ORIGIN = {"files": _FILES, "id?": str, "revision?": str, "license?": str}

FORM_3: Form = {
    "format_version": size,
    "requires": [{"name": str, "since": str}],
    "tool_version?": str,
    "backend": {"name": str, "min_runtime?": version},
    "recipe": str,
    "max_seq_len": count,
    "num_draft_tokens": {"default": count, "max": count},
    "limits": {"num_tokens": count, "num_outputs": count, "cache_rows": count, "window_rows": count},
    "row_multiple": count,
    "row_multiple_arm64?": count,
    "tokens": {**_TOKENS, "channels?": {"*": two_ids}, "parts?": {"*": _PART}},
    "sampling?": (None, {"temperature": number, "top_k": size, "top_p": number, "repetition_penalty?": penalty}),
    "target": _TEXT_CONFIG,
    "drafter": {"text": _TEXT_CONFIG},
    "two_stage": (None, {"origin": str, "num_clusters": size, "cluster_size": size, "top_k_clusters": size}),
    "kv": {"buffers": [{**_BUFFER, "dtype": str, "layout": [str]}]},
    "graphs": {"target": _GRAPH, "drafter": _GRAPH},
    "tables": {"embed_tokens": TABLE, "embed_tokens_per_layer?": TABLE, "head?": TABLE},
    "source": {"target": {**_ORIGIN, "adapters?": [_ORIGIN]}, "drafter": _ORIGIN},
    "files": {"*": {"size": size, "sha256": str}},
    "widths?": [{"bits": size, "group_size": (None, size), "matrices": [str]}],
    "activations?": str,
    "calibration?": {"texts": str, "sha256": str, "tokens": size, "threads": size, "matrices": [str]},
    "chat?": {
        "begin": str,
        "turns": {"user": two_texts, "assistant": two_texts, "*": two_texts},
        "answer": str,
        "trim": bool,
        "alternate": bool,
        "hidden": (None, two_texts),
    },
    "conversations?": [
        {
            "tools": bool,
            "thinking": [(None, bool)],
            "between": {"*": {"*": str}},
            "trim": [str],
            "hidden": (None, two_texts),
            "thoughts": [str],
            "names": bool,
            "beside": beside,
            "blanks": bool,
        }
    ],
    "tools?": [object],
}
_TABLE_2 = {**_ROWS, "data": _PLACE, "scales?": {**_PLACE, "dtype": str}}
_ONLY_3 = ("requires", "widths?", "activations?", "calibration?", "conversations?", "tools?")
FORM_2: Form = {
    **{key: form for key, form in FORM_3.items() if key not in _ONLY_3},
    "backend": {"name": str, "executorch?": version},
    "tokens": {**_TOKENS, "thoughts?": (None, two_ids)},
    "kv": {"buffers": [_BUFFER]},
    "tables": {"embed_tokens": _TABLE_2, "embed_tokens_per_layer": _TABLE_2},
    "source": {"target": _FILES, "drafter": _FILES},
}

_NAMES = {str: "text", bool: "true or false"}


def check_form(value: Any, form: Form, path: str) -> None:
    """Check a value of a manifest.

    Args:
        value: as parsed from JSON.
        form: what it must be like.
        path: names of the keys that lead to the value, joined by dots, which messages name.

    Raises:
        ValueError: the value, or one inside it, is missing or of another form.
    """
    if isinstance(form, dict):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path or 'the document'} is {value!r:.60}, expected an object")
        named = {key.removesuffix("?"): inner for key, inner in form.items() if key != "*"}
        for key in form.keys() - {"*"}:
            if key.removesuffix("?") not in value and not key.endswith("?"):
                raise ValueError(f"{path}.{key}".lstrip(".") + " is missing")
        for key, item in value.items():
            if (inner := named.get(key, form.get("*"))) is not None:
                check_form(item, inner, f"{path}.{key}".lstrip("."))
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{path} is {value!r:.60}, expected a list")
        for i, item in enumerate(value):
            check_form(item, form[0], f"{path}[{i}]")
    elif isinstance(form, tuple):
        if value is not None:
            check_form(value, form[1], path)
    elif isinstance(form, type):
        if not isinstance(value, form):
            raise ValueError(f"{path} is {value!r:.60}, expected {_NAMES[form]}")
    else:
        try:
            form(value)
        except ValueError as error:
            raise ValueError(f"{path} {error}".strip()) from None
