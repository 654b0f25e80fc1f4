"""Embedding tables: rows that are read where they lie in a bundle's files, and widened to float32."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime_ref.errors import InputError


class Table:
    """One table of a bundle, as FORMAT.md specifies it; only the rows that are asked for are ever read."""

    def __init__(self, bundle: Path, facts: Mapping[str, Any]) -> None:
        """`facts` are the manifest's.

        Raises:
            ValueError: the manifest describes something that its files are too short for, or no known encoding.
        """
        self.columns, self.encoding = int(facts["columns"]), str(facts["encoding"])
        rows, row_bytes, group = int(facts["rows"]), int(facts["row_bytes"]), int(facts["group_size"])
        wide = self.encoding == "float32"
        if self.encoding not in ENCODINGS or row_bytes * 8 < self.columns * ENCODINGS[self.encoding]:
            raise ValueError(f"a table has {row_bytes} bytes for {self.columns} numbers in {self.encoding!r}")
        if not 0 < rows < 1 << 40 or not 0 < self.columns < 1 << 30 or not 0 < group < 1 << 30 or row_bytes % 4 * wide:
            raise ValueError(f"a table of {rows} x {self.columns}, {row_bytes} bytes a row, in groups of {group}")
        self._file = bundle / facts["data"]["file"]
        self._rows = _mapped(bundle, facts["data"], np.uint8, (rows, row_bytes))
        self._scales: np.ndarray | None = None
        if not wide:
            dtype = _SCALES[facts["scales"]["dtype"]]
            self._scales = _mapped(bundle, facts["scales"], dtype, (rows, -(-self.columns // group)))
        self.group = group

    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        """Rows [T, columns] float32 of the ids.

        Raises:
            InputError: an id beyond the table, which no sound bundle's graphs choose.
        """
        if wrong := [token for token in ids if not 0 <= token < len(self._rows)]:
            raise InputError(f"{self._file}: has {len(self._rows)} rows, token {wrong[0]} was chosen; export it again")
        numbers = unpack(self._rows[ids], self.encoding, self.columns)
        if self._scales is None:
            return numbers
        scales = self._scales[ids]
        if scales.dtype == np.uint16:  # bfloat16, which numpy does not know: the upper half of a float32
            scales = (scales.astype(np.uint32) << 16).view(np.float32)
        return numbers * np.repeat(scales.astype(np.float32), self.group, axis=1)[:, : self.columns]


def unpack(rows: np.ndarray, encoding: str, columns: int) -> np.ndarray:
    """Numbers [T, columns] float32 of the bytes of rows [T, row_bytes], without their scales."""
    if encoding == "float32":
        return rows.view("<f4")[:, :columns]
    if encoding == "int8":
        return rows.view(np.int8)[:, :columns].astype(np.float32)
    bits = ENCODINGS[encoding]
    if bits < 8:
        stream = np.unpackbits(rows, axis=1, count=columns * bits, bitorder="little")
        rows = np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little").reshape(len(rows), columns)
    return rows[:, :columns].astype(np.float32) - np.float32(2 ** (bits - 1))


# Bits of a number, by encoding; from the unsigned ones, half of their range is subtracted.
ENCODINGS = {"float32": 32, "int8": 8, "uint8": 8, "uint4": 4, "uint3": 3, "uint2": 2}

_SCALES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


def _mapped(bundle: Path, place: Mapping[str, Any], dtype: Any, shape: tuple[int, int]) -> np.ndarray:
    return np.memmap(bundle / place["file"], dtype, "r", int(place["offset"]), shape)
