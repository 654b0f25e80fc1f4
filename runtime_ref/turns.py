"""Turns at the one engine of an open bundle: a thread at a time runs passes, and nobody once it is closed."""

import contextlib
import threading
from collections.abc import Callable, Iterator

CLOSED = "the decoder is closed; open the bundle again"


class DecoderClosedError(RuntimeError):
    """The decoder was closed."""


class Turns:
    """Who may run passes. Threads that wait for a turn get it in any order."""

    def __init__(self, free: Callable[[], None]) -> None:
        """Begin open, with no turn taken.

        Args:
            free: called once after `close`, when nobody has a turn.
        """
        self._free, self._closed, self._freed = free, False, False
        self._lock = threading.RLock()  # one that only its owner can release
        self._owner = 0  # the thread whose turn it is

    def check_open(self) -> None:
        """Raise an error after `close`.

        Raises:
            RuntimeError: it was called.
        """
        if self._closed:
            raise DecoderClosedError(CLOSED)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have a turn while the block runs, after those of other threads.

        Raises:
            RuntimeError: it is closed, or this thread has a turn already: it is in a signal handler.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("a pass is running in this thread; wait until it ends")
        with self._lock:
            self._owner = threading.get_ident()  # first: a signal handler that closes must see it
            try:
                self.check_open()
                yield
            finally:
                self._owner = 0
                if self._closed:  # by a signal handler of this thread, or by another, which waits for the lock
                    self._free_once()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let others have turns while the block runs, in the middle of a turn of this thread.

        Raises:
            RuntimeError: it was closed meanwhile.
        """
        self._owner = 0
        self._lock.release()
        try:
            yield
        finally:
            try:
                self._lock.acquire()
            except BaseException:  # Ctrl-C while it waits; what called this holds the lock again all the same
                with contextlib.suppress(RuntimeError):  # unless it had the lock already
                    self._lock.release()
                self._lock.acquire()
                raise
            finally:
                self._owner = threading.get_ident()
        self.check_open()

    def close(self) -> None:
        """End all turns: wait for the one that is running, then free. Afterwards it does nothing."""
        self._closed = True
        if self._owner == threading.get_ident():
            return  # the end of the turn that a signal handler interrupted frees
        with self._lock:
            self._free_once()

    def _free_once(self) -> None:
        if not self._freed:
            self._freed = True
            self._free()
