"""The folder beside a bundle for what belongs to a device: measured costs, and which files were checked."""

import tempfile
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
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        aside = Path(stream.name)
        try:
            stream.write(text)
            stream.close()
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
