"""Prompts as token ids, from a JSON file."""

import json
from pathlib import Path

from runtime_ref.errors import InputError


def read_prompt_ids(path: Path) -> list[list[int]]:
    """Read a JSON list of token ids, or a list of such lists.

    Raises:
        InputError: no such file, not JSON, or anything else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); expected a list of token ids") from error
    prompts = value if isinstance(value, list) and value and all(isinstance(v, list) for v in value) else [value]
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
            raise InputError(f"{path}: expected a JSON list of token ids, or a list of such lists")
        if not prompt:
            raise InputError(f"{path}: a prompt is empty; expected at least one token id")
    return prompts
