"""Embedding tables, whose rows are read from mapped files and converted to float32."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime_ref.errors import InputError


class Table:
    """One table of a bundle, as FORMAT.md specifies it; only the rows that are asked for are read.

    Attributes:
        columns: numbers in a row.
        encoding: how they are stored, a key of `ENCODING_BITS`.
        group_size: consecutive numbers of a row that share a scale.
    """

    def __init__(self, bundle: Path, metadata: Mapping[str, Any]) -> None:
        """Map a table's files.

        Args:
            bundle: directory of the bundle.
            metadata: the table's entry in the manifest.

        Raises:
            ValueError: the encoding or a size is impossible, or the files are too short. KeyError, TypeError,
                OverflowError or OSError are raised for an entry of another form, or files that cannot be mapped.
        """
        self.columns, self.encoding = int(metadata["columns"]), str(metadata["encoding"])
        rows, row_bytes, group_size = (int(metadata[key]) for key in ("rows", "row_bytes", "group_size"))
        is_float = self.encoding == "float32"
        if self.encoding not in ENCODING_BITS or row_bytes * 8 < self.columns * ENCODING_BITS[self.encoding]:
            raise ValueError(f"a table has {row_bytes} bytes for {self.columns} numbers in {self.encoding!r}")
        possible = 0 < rows < 1 << 40 and 0 < self.columns < 1 << 30 and 0 < group_size < 1 << 30
        if not possible or row_bytes % 4 * is_float:
            raise ValueError(f"a table of {rows} x {self.columns}, {row_bytes} bytes a row, in groups of {group_size}")
        self.rows, self.group_size = rows, group_size
        self._bundle = bundle
        self._data = _MappedRows(bundle, metadata["data"], np.dtype(np.uint8), row_bytes)
        self._scales: _MappedRows | None = None
        if not is_float:
            dtype = _SCALE_DTYPES[metadata["scales"]["dtype"]]
            self._scales = _MappedRows(bundle, metadata["scales"], dtype, -(-self.columns // group_size))

    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        """Return the rows of token ids, [T, columns] float32.

        Args:
            ids: T token ids.

        Raises:
            InputError: an id is beyond the table; graphs of an intact bundle choose none.
        """
        if wrong := [token for token in ids if not 0 <= token < self.rows]:
            raise InputError(
                f"{self._bundle}: a table has {self.rows} rows, token {wrong[0]} was chosen; export it again"
            )
        numbers = unpack(self._data[ids], self.encoding, self.columns)
        if self._scales is None:
            return numbers
        scales = self._scales[ids]
        if scales.dtype == np.uint16:  # bfloat16, which numpy does not know: the upper half of a float32
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        return numbers * np.repeat(scales.astype(np.float32), self.group_size, axis=1)[:, : self.columns]


def unpack(rows: np.ndarray, encoding: str, columns: int) -> np.ndarray:
    """Convert bytes of rows to numbers, without their scales.

    Args:
        rows: [T, row_bytes] uint8.
        encoding: a key of `ENCODING_BITS`.
        columns: numbers in a row; bytes after them are ignored.

    Returns:
        [T, columns] float32.
    """
    if encoding == "float32":
        return rows.view("<f4")[:, :columns]
    if encoding == "int8":
        return rows.view(np.int8)[:, :columns].astype(np.float32)
    bits = ENCODING_BITS[encoding]
    if bits in (2, 4):  # several whole numbers in a byte
        whole = np.empty((len(rows), rows.shape[1] * (8 // bits)), np.uint8)
        for i in range(8 // bits):
            whole[:, i :: 8 // bits] = rows >> np.uint8(i * bits) & np.uint8(2**bits - 1)
        rows = whole
    elif bits < 8:
        stream = np.unpackbits(rows, axis=1, count=columns * bits, bitorder="little")
        rows = np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little").reshape(len(rows), columns)
    return rows[:, :columns].astype(np.float32) - np.float32(2 ** (bits - 1))


# Bits of a number; unsigned integers stand for themselves minus half of their range.
ENCODING_BITS = {"float32": 32, "int8": 8, "uint8": 8, "uint4": 4, "uint3": 3, "uint2": 2}

_SCALE_DTYPES: dict[str, Any] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


class _MappedRows:
    """Rows of an array that lies in one or several mapped files."""

    def __init__(self, bundle: Path, entry: Mapping[str, Any], dtype: np.dtype, columns: int) -> None:
        self._parts = [
            np.memmap(bundle / part["file"], dtype, "r", int(part["offset"]), (int(part["rows"]), columns))
            for part in entry["parts"]
        ]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        if len(self._parts) == 1:
            return np.asarray(self._parts[0][ids])
        at = np.searchsorted(self._ends, ids, side="right")
        # Counted from the part's end, so indices are negative.
        return np.stack([self._parts[part][token - self._ends[part]] for part, token in zip(at, ids, strict=True)])
