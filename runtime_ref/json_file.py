"""Reading JSON files that may be missing or malformed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.pointers import what_stands_for


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.
        expected: what the error says was expected, and what to do.

    Raises:
        InputError: there is no such file, only a pointer to its content, or it is not JSON in UTF-8.
    """
    return read_json_and_digest(path, expected)[0]


def read_json_and_digest(path: Path, expected: str) -> tuple[Any, str]:
    """Parse a JSON file, as `read_json`, and return the value and the hexadecimal sha256 of what was parsed."""
    try:
        content = path.read_bytes()
        return json.loads(content.decode("utf-8-sig")), hashlib.sha256(content).hexdigest()
    except (OSError, ValueError, RecursionError) as error:
        if (instead := what_stands_for(path)) is not None:
            raise InputError(f"{path}: is {instead}") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise InputError(f"{path}: not found; expected {expected}") from None
        raise InputError(f"{path}: cannot be read as JSON ({error}); expected {expected}") from error
