"""Values of JSON files, checked: each function returns a value of one kind, or says what is wrong with the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file of a checkpoint, which must hold an object.

    Raises:
        InputError: the file does not exist, is not JSON, or holds no object.
    """
    value = read_json(path, "a Hugging Face checkpoint directory with this file")
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; correct the file")
    return value


def boolean(raw: Mapping[str, Any], key: str, path: Path, default: bool) -> bool:
    """Return true or false; `default` for a key that is missing or null.

    Args:
        raw: the object that has the key.
        key: its name.
        path: the file, which messages name.
        default: what a key that is missing or null stands for.

    Raises:
        InputError: the value is of another kind.
    """
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{path}: {key} is {value!r:.60}, expected true or false; correct the file")
    return default if value is None else value


def integer(raw: Mapping[str, Any], key: str, path: Path, default: int, minimum: int = 0) -> int:
    """Return a whole number of at least `minimum`; `default` for a key that is missing or null.

    Args:
        raw: the object that has the key.
        key: its name.
        path: the file, which messages name.
        default: what a key that is missing or null stands for.
        minimum: 0 or 1.

    Raises:
        InputError: the value is of another kind.
    """
    stored = raw.get(key)
    value = default if stored is None else stored
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31:
        expected = "a positive integer" if minimum else "an integer that is not negative"
        raise InputError(f"{path}: {key} is {stored!r}, expected {expected}; correct the file")
    return value


def positive_int(raw: Mapping[str, Any], key: str, path: Path, default: int = 0) -> int:
    """Return a whole number above 0; `default` for a key that is missing or null.

    Args:
        raw: the object that has the key.
        key: its name.
        path: the file, which messages name.
        default: what a key that is missing or null stands for.

    Raises:
        InputError: the value is of another kind.
    """
    return integer(raw, key, path, default, minimum=1)


def positive_float(raw: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """Return a number above 0; `default` for a key that is missing or null.

    Args:
        raw: the object that has the key.
        key: its name.
        path: the file, which messages name.
        default: what a key that is missing or null stands for.

    Raises:
        InputError: the value is of another kind.
    """
    stored = raw.get(key)
    value = default if stored is None else stored
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise InputError(f"{path}: {key} is {stored!r}, expected a positive number; correct the file")
    return float(value)


def json_object(raw: Mapping[str, Any], key: str, path: Path, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an object; `default` for a key that is missing or null.

    Args:
        raw: the object that has the key.
        key: its name.
        path: the file, which messages name.
        default: what a key that is missing or null stands for.

    Raises:
        InputError: the value is of another kind.
    """
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} is {value!r}, expected an object; correct the file")
    return value
