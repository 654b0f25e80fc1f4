"""A user at a terminal of the command line."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C in this terminal sends a signal to this process
from exporter.cli.main import main
main()
"""


class TerminalUser:
    """A user who runs the command line in a terminal, types and reads.

    Attributes:
        terminal: file descriptor of the terminal.
        program: the running program.
        unread: output that was not read yet.
    """

    def __init__(self, home: Path, script: str, *arguments: object) -> None:
        self.terminal, side = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 300, 0, 0))
        (home / "inputrc").write_text("set editing-mode emacs\n")
        environment = os.environ | {"TERM": "dumb", "INPUTRC": str(home / "inputrc"), "OMP_NUM_THREADS": "1"}
        self.program = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            env=environment,
        )
        os.close(side)
        self.unread, self._decode = "", codecs.getincrementaldecoder("utf-8")().decode

    def type_keys(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """Wait for output that matches a pattern, and return all unread output up to its end."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.unread, re.S)):
            ready, *_ = select.select([self.terminal], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern!r} in {seconds} s, but {self.unread!r}"
            try:
                new = os.read(self.terminal, 4096)
            except OSError:  # on Linux, the program has closed its end
                new = b""
            assert new, f"the program ended without {pattern!r}: {self.unread!r}"
            # Without the sequences that switch bracketed paste on and off.
            self.unread = re.sub(r"\x1b\[\?2004[hl]\r?", "", self.unread + self._decode(new))
        text, self.unread = self.unread[: match.end()], self.unread[match.end() :]
        return text

    def leave(self) -> int:
        """Press Ctrl-D, and return the program's exit code."""
        self.type_keys("\x04")
        return self.program.wait(120)


@pytest.fixture
def user_of(tmp_path: Path) -> Iterator[Callable[..., TerminalUser]]:
    """Run the command line with arguments in a terminal of its own, after other code."""
    users: list[TerminalUser] = []

    def start(*arguments: object, before: str = "") -> TerminalUser:
        users.append(TerminalUser(tmp_path, before + SCRIPT, *arguments))
        return users[-1]

    yield start
    for user in users:
        user.program.kill()
        user.program.wait()
        os.close(user.terminal)
