"""Write output files and directories as a whole or not at all.

Outputs that exist are refused unless the user allows their replacement. New ones are written under a temporary name
beside their final place, and renamed when they are complete.
"""

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
    """Format a number of bytes in decimal units, as file managers and app stores do."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def check_file(file: Path, force: bool) -> None:
    """Check that an output file can be written, before any work is done.

    Args:
        file: path of the file to write.
        force: whether an existing file may be replaced.

    Raises:
        InputError: the file exists and may not be replaced, the path is not that of a file, or its directory is missing
            or cannot be written to.
    """
    if not os.access(file.parent, os.W_OK | os.X_OK) or not file.parent.is_dir():
        raise InputError(f"{file}: its directory is missing or cannot be written to; create it, or choose another file")
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: exists and is not a file; choose another one")
    if (file.exists() or file.is_symlink()) and not force:
        raise InputError(f"{file}: exists already; choose another file, or pass --force to replace it")


def write_file(file: Path, content: bytes) -> None:
    """Write a file as a whole or not at all.

    Args:
        file: path of the file; an existing one is replaced. If it is a symbolic link, its destination is replaced.
        content: all bytes of the file.

    Raises:
        InputError: the file cannot be written.
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


def check_directory(output: Path, force: bool, is_replaceable: Callable[[Path], bool], expected: str) -> None:
    """Check that an output directory can be written, before any work is done.

    Args:
        output: path of the directory to write.
        force: whether an existing directory may be replaced, if `is_replaceable` allows it.
        is_replaceable: gets an existing directory and returns whether it holds nothing but an earlier output.
        expected: what such an output is called in messages, such as "a bundle".

    Raises:
        InputError: the directory exists and may not be replaced, or its path cannot be used.
    """
    try:
        if not output.exists() and not output.is_symlink():
            return
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    if not force:
        raise InputError(f"{output}: exists already; choose another --output, or pass --force to replace it")
    if not output.is_dir() or not is_replaceable(output):
        raise InputError(f"{output}: is not {expected}, so it will not be replaced; choose another --output")


def check_free_space(output: Path, disk_bytes: int, memory_bytes: int) -> None:
    """Check that disk and memory suffice, before any work is done.

    Args:
        output: path to be written; its nearest existing parent directory decides which disk is checked.
        disk_bytes: bytes that will be written.
        memory_bytes: peak memory that is needed. It is checked on Linux only.

    Raises:
        InputError: there is less free disk space or available memory than that.
    """
    output = output.resolve()
    parent = next(path for path in output.parents if path.exists())
    if disk_bytes > (free := shutil.disk_usage(parent).free):
        raise InputError(
            f"{output}: needs {human_bytes(disk_bytes)} of disk, {human_bytes(free)} are free; free some space, or"
            " choose another --output"
        )
    if not _MEMINFO.exists():
        return
    available_kib = re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB", _MEMINFO.read_text(), re.M)
    if available_kib and memory_bytes > (free := sum(map(int, available_kib)) * 1024):
        raise InputError(
            f"{output}: needs about {human_bytes(memory_bytes)} of memory, {human_bytes(free)} are free; close other"
            " programs, or use a larger machine"
        )


_MEMINFO = Path("/proc/meminfo")


def holds_only(directory: Path, marker: str, listed: Callable[[Any], Iterable[str]]) -> bool:
    """Return whether a directory is empty, or holds a marker file and otherwise only files that the marker lists.

    Args:
        directory: an existing directory.
        marker: name of a JSON file in the directory.
        listed: gets the marker's parsed content and returns the paths that it lists, relative to the directory. For
            content of another form it may raise KeyError or TypeError.
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
    """Return the sum of the sizes, in bytes, of the files directly in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that replaces `output` when the block ends without an error.

    The temporary directory is beside `output`. After an error it is removed, and `output` stays as it was. The block
    should write the file that marks the directory as complete last: a killed process then leaves no directory that
    looks complete.

    Args:
        output: the directory to create or replace. If it is a symbolic link, its destination is replaced.

    Raises:
        InputError: the directory cannot be written.
    """
    output = output.resolve()
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
    """Remove the temporary directories that killed processes of this machine left beside `output`.

    Their names contain the host and the process id. If such a process was just replacing an output, the old output is
    put back, unless `output` exists again.

    Args:
        output: the directory that was to be written, as `replacing` got it.
    """
    output = output.resolve()
    for leftover in sorted(output.parent.glob(f".{glob.escape(output.name)}.partial-*"), reverse=True):
        owner = re.fullmatch(r"(\d+)@(.+?)-[^-]+(-old)?", leftover.name.removeprefix(f".{output.name}.partial-"))
        if owner is None or owner[2] != socket.gethostname() or _is_running(int(owner[1])):
            continue
        if owner[3] and not output.exists():
            leftover.rename(output)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)  # signal 0 only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it exists, and belongs to another user
        return True
    return True
