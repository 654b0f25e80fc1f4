"""Writing arrays one after the other into a file, or into several of a bounded size."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from runtime_ref.errors import InputError


class SplitFile:
    """An output file that goes on in another one where it would exceed a size: `NAME.ext`, `NAME.1.ext`, and so on."""

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        """Begin the first file.

        Args:
            path: of the first file, which must not exist.
            max_bytes: largest size of each file; None for one file.
        """
        self._path, self._max_bytes, self._number = path, max_bytes, 0
        self._stream: BinaryIO = path.open("xb")

    def __enter__(self) -> "SplitFile":
        """Return the file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the newest file."""
        self._stream.close()

    @property
    def offset(self) -> int:
        """Bytes of the newest file so far."""
        return self._stream.tell()

    @property
    def file(self) -> str:
        """Name of the newest file."""
        return split_path(self._path, self._number).name

    def begin(self, name: str, num_bytes: int, alignment_bytes: int = 1) -> None:
        """Prepare for an array that must lie in one file: pad up to its alignment, or go on in another file.

        Args:
            name: of the array, for the message.
            num_bytes: of the array.
            alignment_bytes: its offset becomes a multiple of this.

        Raises:
            InputError: the array alone exceeds the largest size of a file.
        """
        padding = -self.offset % alignment_bytes
        if self._max_bytes is not None and self.offset + padding + num_bytes > self._max_bytes:
            if num_bytes > self._max_bytes:
                raise too_large(name, num_bytes, self._max_bytes)
            if self.offset:
                self._next_file()
                padding = 0
        self._stream.write(b"\0" * padding)

    def write(self, array: np.ndarray) -> None:
        """Write an array, for which `begin` made room."""
        self._stream.write(array.data)  # ndarray.tofile would hide the reason of a failure

    def write_rows(self, rows: np.ndarray, parts: list[dict[str, int | str]]) -> None:
        """Write rows of an array, each of which lies in one file.

        Args:
            rows: [rows, columns], not empty.
            parts: where the rows before them lie: `file`, `offset` and `rows` of each part. It is extended.
        """
        while len(rows):
            room = len(rows)
            if self._max_bytes is not None:
                self.begin("a row", rows[:1].nbytes)
                room = (self._max_bytes - self.offset) // rows[:1].nbytes
            written = rows[:room]
            if parts and parts[-1]["file"] == self.file:
                parts[-1]["rows"] = int(parts[-1]["rows"]) + len(written)
            else:
                parts.append({"file": self.file, "offset": self.offset, "rows": len(written)})
            self.write(written)
            rows = rows[room:]

    def _next_file(self) -> None:
        self._stream.close()
        self._number += 1
        self._stream = split_path(self._path, self._number).open("xb")


def split_path(path: Path, number: int) -> Path:
    """Return the path of a file's continuation: number 0 is the file itself, then `NAME.1.ext`, `NAME.2.ext`."""
    return path if number == 0 else path.with_suffix(f".{number}{path.suffix}")


def too_large(name: str, num_bytes: int, max_bytes: int) -> InputError:
    """Return the error of something that must lie in one file and exceeds `--max-file-size`."""
    return InputError(
        f"--max-file-size is {max_bytes}, but {name} needs at least {num_bytes} bytes in one file; allow as many"
    )
