"""Write output files and directories as a whole or not at all.

Outputs that exist are refused unless the user allows their replacement. New ones are written under a temporary name
beside their final place, and renamed when they are complete.
"""

import contextlib
import ctypes
import errno
import fnmatch
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from exporter.memory import available_memory
from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json
from runtime_ref.locks import locked
from runtime_ref.manifest import MANIFEST

# Files that file managers, sync tools and file systems leave in directories: patterns of names.
FOREIGN_FILES = (
    *(".DS_Store", "._*", ".localized", "Icon\r"),  # macOS
    *("Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "Desktop.ini"),  # Windows
    *(".directory", ".hidden"),  # Linux desktops
    *(".dropbox", ".dropbox.attr", ".stignore", ".syncthing.*", ".SyncID", ".SyncIgnore"),
    *(".nextcloudsync.log", ".owncloudsync.log", ".sync_*.db*", "._sync_*.db*", ".~lock.*#"),
    *(".fuse_hidden*", ".nfs*"),
)
FOREIGN_DIRECTORIES = ("@eaDir", ".stfolder", ".tmp.drivedownload", ".tmp.driveupload")  # with all that is in them
CHECKPOINT_FILES = (".safetensors", ".json", ".jinja")  # what checkpoints consist of


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
        InputError: the file exists and may not be replaced, be it one of a bundle or a checkpoint; the path is not that
            of a file; or its directory is missing or cannot be written to.
    """
    directory = file.resolve().parent  # of what a symbolic link leads to
    if not os.access(directory, os.W_OK | os.X_OK) or not directory.is_dir():
        raise InputError(f"{file}: its directory is missing or cannot be written to; create it, or choose another file")
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: exists and is not a file; choose another one")
    if (file.exists() or file.is_symlink()) and not force:
        raise InputError(f"{file}: exists already; choose another file, or pass --force to replace it")
    if file.exists() and _is_of_a_model(file.resolve()):
        raise InputError(f"{file}: is one of the files of a bundle or a checkpoint; choose another file")


def _is_of_a_model(file: Path) -> bool:
    """Whether a file is one that a manifest beside it names, or, beside a config.json, of a checkpoint's kinds."""
    named = set()
    with contextlib.suppress(InputError, KeyError, TypeError):  # not a manifest of ours
        named = {MANIFEST, *read_json(file.parent / MANIFEST, "a JSON object")["files"]}
    return file.name in named or (file.suffix in CHECKPOINT_FILES and (file.parent / "config.json").is_file())


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
    if output.resolve().is_mount():
        raise InputError(f"{output}: is a mount point, which cannot be replaced; choose a directory inside it")
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
    anyway = "or pass --skip-room-check if that is wrong"
    if disk_bytes > (free := shutil.disk_usage(parent).free):
        raise InputError(
            f"{output}: needs {human_bytes(disk_bytes)} of disk, {human_bytes(free)} are free; free some space, choose"
            f" another --output, {anyway}"
        )
    available = available_memory()
    if available is not None and memory_bytes > available:
        raise InputError(
            f"{output}: needs about {human_bytes(memory_bytes)} of memory, {human_bytes(available)} are free; close"
            f" other programs, raise the container's limit, use a larger machine, {anyway}"
        )


def holds_only(directory: Path, marker: str, listed: Callable[[Any], Iterable[str]]) -> bool:
    """Return whether a directory is empty, or holds a marker file and otherwise only files that the marker lists.

    Files that match `FOREIGN_FILES`, and files in `FOREIGN_DIRECTORIES`, do not count.

    Args:
        directory: an existing directory.
        marker: name of a JSON file in the directory.
        listed: gets the marker's parsed content and returns the paths that it lists, relative to the directory. For
            content of another form it may raise KeyError or TypeError.
    """
    paths = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]
    relative = [path.relative_to(directory) for path in paths]
    names = {path.as_posix() for path in relative if not _is_foreign(path)}
    if marker not in names:
        return not names
    try:
        return names <= {marker, *listed(read_json(directory / marker, "a JSON object"))}
    except (InputError, KeyError, TypeError):
        return False


def directory_bytes(directory: Path) -> int:
    """Return the sum of the sizes, in bytes, of the files directly in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())


def _is_foreign(path: Path) -> bool:
    if any(directory in FOREIGN_DIRECTORIES for directory in path.parts[:-1]):
        return True
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in (*FOREIGN_FILES, *FOREIGN_DIRECTORIES))


@contextlib.contextmanager
def replacing(output: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty temporary directory that replaces `output` when the block ends without an error.

    The temporary directory is beside `output`. After an error it is removed, and `output` stays as it was. While the
    block runs, a lock keeps other processes from writing the same output.

    Args:
        output: the directory to create or replace. If it is a symbolic link, its destination is replaced.
        check: called under the lock before anything is written; it raises if the output may not be replaced.

    Raises:
        InputError: another process is writing the output, or the directory cannot be written.
    """
    output = output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _writing(output):
            check()
            partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(output), dir=output.parent))
            try:
                yield partial
                partial.chmod(0o755)
                _put_in_place(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else "check the directory"
        raise InputError(f"{output}: writing failed ({reason}); {hint} and try again") from error


def recover(output: Path) -> None:
    """Clear up what a killed process left beside `output`; an output that it was just replacing is put back.

    Args:
        output: the directory that was to be written, as `replacing` got it.

    Raises:
        InputError: another process is writing the output, or its directory cannot be written.
    """
    output = output.resolve()
    if not any(output.parent.glob(f"{glob.escape(_partial_prefix(output))}*")):
        return
    try:
        with _writing(output):
            pass
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold a lock beside a file while the block runs, because what is read from it is replaced at the end.

    Raises:
        InputError: another process holds it.
    """
    with _locked(file.resolve(), "use.lock"):
        yield


def kept_beside(output: Path) -> Path:
    """Return the directory beside an output in which what is finished is kept, for a killed command to go on from."""
    output = output.resolve()
    return output.with_name(f".{output.name}.kept")


@contextlib.contextmanager
def keeping(output: Path) -> Iterator[Path]:
    """Yield the directory `kept_beside` an output; it stays if the block ends with an error, unless it is empty.

    Args:
        output: what the block writes. A lock keeps other processes from the directory.

    Raises:
        InputError: another process is writing the output, or there is no place for the directory.
    """
    directory = kept_beside(output)
    with contextlib.ExitStack() as stack:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(output.resolve(), "kept.lock"))
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
        try:
            yield directory
        except BaseException:
            with contextlib.suppress(OSError):  # there is something in it
                directory.rmdir()
            raise
        shutil.rmtree(directory, ignore_errors=True)


REPLACED = "-old"  # ends the name of an output that was moved aside


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-"


@contextlib.contextmanager
def _locked(output: Path, lock: str) -> Iterator[bool]:
    """Hold a lock of an output while the block runs, as `locked` does, and refuse if another process holds it."""
    with contextlib.ExitStack() as stack:
        try:
            is_locked = stack.enter_context(locked(output.with_name(f".{output.name}.{lock}"), wait=False))
        except BlockingIOError:
            raise InputError(f"{output}: another process is writing it; wait until it ends, and try again") from None
        yield is_locked


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Hold the lock of an output while the block runs, after clearing up what killed processes left."""
    with _locked(output, "lock") as is_locked:
        if is_locked:  # so nobody else is writing: what lies here was left behind
            for leftover in output.parent.glob(f"{glob.escape(_partial_prefix(output))}*"):
                if leftover.name.endswith(REPLACED) and not output.exists():
                    leftover.rename(output)
                elif leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        yield


def _put_in_place(partial: Path, output: Path) -> None:
    """Let a complete directory take the place of an output, if there is one, which is removed."""
    if not output.exists():
        partial.rename(output)
    elif _exchange(partial, output):
        shutil.rmtree(partial, ignore_errors=True)  # it is the old output now
    else:
        replaced = partial.with_name(partial.name + REPLACED)
        output.rename(replaced)
        try:
            partial.rename(output)
        except BaseException:
            replaced.rename(output)
            raise
        replaced.rename(partial)  # so that a half-removed one is never taken for an output
        shutil.rmtree(partial, ignore_errors=True)


# The C library's function that exchanges two paths in one step, and its arguments around each path: directory, flags.
_EXCHANGES = {"renameat2": ((-100,), (-100,), (2,)), "renamex_np": ((), (), (2,))}  # Linux; macOS


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step, so that a kill leaves none missing; False where that is not possible."""
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    for name, (before, between, after) in _EXCHANGES.items():
        if (function := getattr(library, name, None)) is not None:
            return function(*before, os.fsencode(one), *between, os.fsencode(other), *after) == 0
    return False
