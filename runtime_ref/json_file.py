"""Reading JSON that somebody else wrote."""

import json
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file, or say in one line why that cannot be done and what was `expected`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not found; expected {expected}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); expected {expected}") from error
