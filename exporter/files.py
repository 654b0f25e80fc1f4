"""Single output files: refused if they exist, written aside and renamed."""

import os
import tempfile
from pathlib import Path

from runtime_ref.errors import InputError


def check_file(file: Path, force: bool) -> None:
    """Refuse a file to write that is there already or has no directory to be in, before any work is done.

    Raises:
        InputError: it exists and is not to be replaced, is no file, or its directory is not there or not writable.
    """
    if not os.access(file.parent, os.W_OK | os.X_OK) or not file.parent.is_dir():
        raise InputError(f"{file}: its directory is not there or cannot be written; create it, or choose another file")
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: exists and is not a file; choose another one")
    if (file.exists() or file.is_symlink()) and not force:
        raise InputError(f"{file}: exists already; choose another file, or pass --force to replace it")


def write_file(file: Path, content: bytes) -> None:
    """Write a whole file or nothing; through a link, what it points to is replaced.

    Raises:
        InputError: it cannot be written.
    """
    file = file.resolve()
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
