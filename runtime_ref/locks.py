"""Locks that threads and processes share, on files. They need Linux or macOS; elsewhere nothing is locked."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock while the block runs; the system releases it if the process dies, whatever host or container it is.

    Args:
        file: the lock's file, which is created, and removed when the block ends. Its directory must exist.
        wait: whether to wait for another holder to end.

    Yields:
        Whether the lock is held; False where the file system has no locks.

    Raises:
        BlockingIOError: another thread or process holds the lock, and `wait` is false.
        OSError: the file cannot be created.
    """
    if fcntl is None:
        yield False
        return
    descriptor = _open_locked(file, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # another user's file in a directory of all users
                file.unlink()
            os.close(descriptor)


def _open_locked(file: Path, wait: bool) -> int | None:
    """Open and lock a file; None where the file system has no locks."""
    while True:
        descriptor, denied = _open(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder before removes the file at its end: then what was locked is no longer what others will open.
            if _is_same(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            os.close(descriptor)
            if denied is not None:
                raise denied from None
            file.unlink(missing_ok=True)
            return None
        os.close(descriptor)


def _open(file: Path) -> tuple[int, PermissionError | None]:
    """Open a file to be locked; with the error if it is another user's, so that it was opened for reading only."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666), None
    except PermissionError as error:
        try:
            return os.open(file, os.O_RDONLY), error  # most file systems can lock it all the same
        except OSError:
            raise error from None


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
