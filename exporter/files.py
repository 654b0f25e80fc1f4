"""Single output files: refused if they exist, written aside and renamed."""

import os
import tempfile
from pathlib import Path

from runtime_ref.errors import InputError


def check_file(file: Path, force: bool) -> None:
    """Refuse a file to write that is there already, or whose directory is not, before any work is done.

    Raises:
        InputError: it exists and is not to be replaced, or cannot be written.
    """
    if not file.parent.is_dir():
        raise InputError(f"{file}: its directory does not exist; create it, or choose another file")
    if file.is_dir() or (file.exists() and not force):
        hint = "choose another file" if file.is_dir() else "choose another file, or pass --force to replace it"
        raise InputError(f"{file}: exists already; {hint}")


def write_file(file: Path, content: bytes) -> None:
    """Write a whole file or nothing.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.partial-", delete=False) as stream:
            try:
                stream.write(content)
                stream.close()
                Path(stream.name).chmod(0o644)
                Path(stream.name).replace(file)
            except BaseException:
                Path(stream.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"{file}: cannot be written ({reason}); choose another file") from error
