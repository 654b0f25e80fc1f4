"""The folder beside a bundle for what belongs to a device: measured costs, and which files were checked."""

import secrets
from pathlib import Path


def device_folder(bundle: Path) -> Path:
    """Return the folder, which may not exist: beside the bundle, which is the same on every device while this is not.

    Args:
        bundle: directory of the bundle.
    """
    bundle = bundle.resolve()
    return bundle.parent / f"{bundle.name}.device"


def write_whole(file: Path, text: str) -> None:
    """Write a file of the folder whole or not at all, whoever else writes it; the folder must exist.

    Args:
        file: replaced if it exists.
        text: what it holds then.

    Raises:
        OSError: it cannot be written.
    """
    # Not a temporary file, which its owner alone may read: other users run the bundle as well.
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with aside.open("x") as stream:
            stream.write(text)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
