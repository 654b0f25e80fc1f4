"""Prompts as token ids, from a JSON file."""

from pathlib import Path

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json


def read_prompt_ids(path: Path) -> list[list[int]]:
    """Read a JSON list of token ids, or a list of such lists.

    Args:
        path: the JSON file.

    Returns:
        Prompts, each a list of at least one token id.

    Raises:
        InputError: there is no such file, it is not JSON, it holds anything else, or a prompt is empty.
    """
    value = read_json(path, "a list of token ids, or a list of such lists")
    prompts = value if isinstance(value, list) and value and all(isinstance(v, list) for v in value) else [value]
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
            raise InputError(f"{path}: expected a JSON list of token ids, or a list of such lists")
        if not prompt:
            raise InputError(f"{path}: a prompt is empty; expected at least one token id")
    return prompts
