"""Where a checkpoint comes from, as far as it says so itself: id, revision and licence on a model hub."""

import re
from pathlib import Path

MODEL_CARD = "README.md"
# `models--OWNER--NAME/snapshots/REVISION`, as huggingface_hub caches models.
CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
DOWNLOAD_RECORDS = ".cache/huggingface/download"  # of `huggingface_hub` with `local_dir`; they begin with the revision
REVISION = re.compile(r"[0-9a-f]{40}")


def model_origin(directory: Path) -> dict[str, str]:
    """Return what a checkpoint's directory tells about its origin; keys that it does not tell are missing.

    `_name_or_path` in config.json is not taken: for a fine-tune it names the model that it began from.

    Args:
        directory: the checkpoint's directory.

    Returns:
        `id`, such as `google/gemma-4-E2B-it`, `revision`, a commit, and `license`, its name in the model card.
    """
    origin = {
        "id": _cached_id(directory),
        "revision": _revision(directory),
        "license": _card_value(directory / MODEL_CARD, "license"),
    }
    return {key: value for key, value in origin.items() if value}


def _cached_id(directory: Path) -> str | None:
    cached = CACHED.fullmatch(directory.absolute().parent.parent.name)
    return f"{cached['owner']}/{cached['name']}" if cached and directory.absolute().parent.name == "snapshots" else None


def _revision(directory: Path) -> str | None:
    if _cached_id(directory):
        return directory.absolute().name
    records = directory / DOWNLOAD_RECORDS / "config.json.metadata"
    lines = _lines(records)
    return lines[0] if lines and REVISION.fullmatch(lines[0]) else None


def _card_value(path: Path, key: str) -> str | None:
    """A value of a model card's front matter, which is YAML; only one in a line of its own is found."""
    lines = _lines(path)
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    found = (re.fullmatch(rf"{key}:\s*[\"']?([\w.-]+)[\"']?", line) for line in lines[1 : lines.index("---", 1)])
    return next((match[1] for match in found if match), None)


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none where it is missing or no text: it only informs."""
    try:
        return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
