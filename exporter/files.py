"""Output files and directories: refused if they exist, written aside and renamed."""

import contextlib
import errno
import glob
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json


def human_bytes(size: float) -> str:
    """Decimal units, as file managers and app stores count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


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


def check_directory(output: Path, force: bool, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Refuse a directory to write that exists, before any work is done; `force` replaces what `is_ours` knows.

    Raises:
        InputError: it exists, and is not to be or must not be replaced.
    """
    try:
        if not output.exists() and not output.is_symlink():
            return
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    if not force:
        raise InputError(f"{output}: exists already; choose another --output, or pass --force to replace it")
    if not output.is_dir() or not is_ours(output):
        raise InputError(f"{output}: is not {kind}, so it will not be replaced; choose another --output")


def check_room(output: Path, disk: int, memory: int) -> None:
    """Refuse to start what would run out of disk beside `output`, or of memory where the system tells how much is left.

    Raises:
        InputError: so many bytes are not there.
    """
    output = output.resolve()
    parent = next(path for path in output.parents if path.exists())
    if disk > (free := shutil.disk_usage(parent).free):
        raise InputError(
            f"{output}: needs {human_bytes(disk)} of disk, {human_bytes(free)} are free; free some space, or choose"
            " another --output"
        )
    found = re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB", _MEMORY.read_text(), re.M) if _MEMORY.exists() else []
    if found and memory > (free := sum(map(int, found)) * 1024):
        raise InputError(
            f"{output}: needs about {human_bytes(memory)} of memory, {human_bytes(free)} are free; close other"
            " programs, or use a larger machine"
        )


_MEMORY = Path("/proc/meminfo")


def holds_only(directory: Path, marker: str, listed: Callable[[Any], Iterable[str]]) -> bool:
    """Whether a directory is empty, or holds a marker file and nothing that the marker does not list.

    Args:
        directory: an existing directory.
        marker: name of a JSON file in it.
        listed: gives the paths, relative to the directory, that the marker's content lists; it may raise KeyError or
            TypeError for content of another kind.
    """
    paths = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]
    names = {path.relative_to(directory).as_posix() for path in paths}
    if marker not in names:
        return not names
    try:
        return names <= {marker, *listed(read_json(directory / marker, "a JSON object"))}
    except (InputError, KeyError, TypeError):
        return False


def directory_bytes(directory: Path) -> int:
    """Sum of the sizes, in bytes, of the files that lie directly in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A fresh directory beside `output` that takes its place if the block succeeds, and vanishes if it does not.

    What says that the directory is whole is to be written last, so that a killed process leaves nothing that looks so.

    Raises:
        InputError: it cannot be written.
    """
    output = output.resolve()  # through a link, what it points to is replaced
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{os.getpid()}@{socket.gethostname()}"
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{owner}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    try:
        yield partial
        partial.chmod(0o755)
        if output.exists():
            replaced = partial.with_name(partial.name + "-old")
            output.rename(replaced)
            try:
                partial.rename(output)
            except BaseException:
                replaced.rename(output)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(output)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else "check the directory"
        raise InputError(f"{output}: writing failed ({reason}); {hint} and try again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Remove partial outputs that killed processes of this machine left beside `output`; the names carry process ids.

    An output that such a process was about to replace is put back, unless there is another one by now.
    """
    output = output.resolve()
    for leftover in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-*"), reverse=True):
        owner = re.fullmatch(r"(\d+)@(.+?)-[^-]+(-old)?", leftover.name.removeprefix(f".{output.name}.partial-"))
        if owner is None or owner[2] != socket.gethostname() or _runs(int(owner[1])):
            continue
        if owner[3] and not output.exists():
            leftover.rename(output)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 is not sent
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
