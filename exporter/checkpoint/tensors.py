"""Read the safetensors files of a checkpoint directory: all names and shapes first, values in blocks on request."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint.other_forms import unwrapped
from exporter.checkpoint.values import read_object
from exporter.quantization.numbers import Quantized
from exporter.quantization.widths import Width, held
from runtime_ref.errors import InputError
from runtime_ref.manifest import file_sha256
from runtime_ref.pointers import is_present, what_stands_for

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK_BYTES = 1 << 26  # read at a time; the conversions of a block need several times as much memory


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as its file's header describes it.

    Attributes:
        file: the safetensors file that holds it.
        dtype: type by its name in safetensors, such as "BF16".
        shape: sizes of its dimensions.
        offset: bytes from the start of the file to its data.
        name: its name in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    name: str


class Checkpoint:
    """The safetensors files of one directory.

    Attributes:
        directory: the checkpoint's directory.
        files: its safetensors files.
        entries: file, dtype, shape and offset of each tensor, by name; the names are those of the model that a training
            tool has wrapped, if one has.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        """Read the headers of all files.

        Args:
            directory: the checkpoint's directory.
            stem: name of its one file without `.safetensors`, or of the index without `.safetensors.index.json`.

        Raises:
            InputError: weights are missing, pickled or truncated, the index does not fit the files, or two tensors have
                one name.
        """
        self.directory = directory
        weight_map = _weight_map(directory, stem)
        self.files = [directory / name for name in sorted(set(weight_map.values())) or [f"{stem}.safetensors"]]
        entries: dict[str, TensorEntry] = {}
        for file in self.files:
            try:
                with safe_open(file, "pt"):  # checks the header, which _header takes as valid
                    header, data = _header(file)
            except (SafetensorError, OSError) as error:
                instead = what_stands_for(file) or f"not a readable safetensors file ({error}); download it again"
                raise InputError(f"{file}: is {instead}") from error
            for name, fields in header.items():
                start, _ = fields["data_offsets"]
                entries[name] = TensorEntry(file, fields["dtype"], tuple(fields["shape"]), data + start, name)
        self._stamps = {file: _stamp(file) for file in self.files}
        for name, file_name in weight_map.items():
            if name not in entries or entries[name].file.name != file_name:
                raise InputError(
                    f"{directory / file_name}: tensor {name} is not in this file, where the index says it is;"
                    " download both again"
                )
        self.entries: dict[str, TensorEntry] = {}
        for name, plain in unwrapped(entries).items():
            if plain in self.entries:
                raise InputError(
                    f"{entries[name].file}: tensors {self.entries[plain].name} and {name} are both {plain} of the"
                    " model; remove one"
                )
            self.entries[plain] = entries[name]

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Numbers by file name, some of which change when a file is written to or replaced."""
        return {file.name: list(stamp) for file, stamp in self._stamps.items()}

    def map(self, name: str) -> Tensor:
        """Map one tensor into memory, with the dtype it is stored in; pages are read when they are used.

        Raises:
            InputError: its file changed since the checkpoint was opened.
        """
        self._check_unchanged(self.entries[name].file)
        with safe_open(self.entries[name].file, "pt") as opened:
            return opened.get_tensor(self.entries[name].name)

    def blocks(self, name: str, block_rows: int | None = None) -> Iterator[Tensor]:
        """Read one tensor in blocks of whole rows, floats as float32.

        Args:
            name: the tensor's name.
            block_rows: rows of a block; None for as many as `BLOCK_BYTES` hold.

        Blocks are read, not mapped, because the pages of a mapping count as the process's memory once they were used.

        Raises:
            InputError: the tensor holds NaN or infinity, or its file changed since the checkpoint was opened.
        """
        entry = self.entries[name]
        dtype, (rows, *rest) = DTYPES[entry.dtype], entry.shape or (1,)
        row_bytes = prod(rest) * dtype.itemsize
        step = block_rows or max(1, BLOCK_BYTES // max(1, row_bytes))
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                block = torch.empty([count, *rest] if entry.shape else [], dtype=dtype)
                if stream.readinto(block.view(-1).view(torch.uint8).numpy().data) < block.nbytes:
                    raise InputError(f"{entry.file}: ends inside tensor {name}; download it again")
                if dtype.is_floating_point:
                    block = block.float()
                    if not block.isfinite().all():
                        raise InputError(f"{entry.file}: tensor {name} holds NaN or infinity; restore the checkpoint")
                yield block
        self._check_unchanged(entry.file)

    def load(self, name: str) -> Tensor:
        """Read one whole tensor, floats as float32.

        Raises:
            InputError: the tensor holds NaN or infinity, or its file changed since the checkpoint was opened.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        whole = torch.empty(entry.shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
        start = 0
        for block in self.blocks(name):
            whole.view(-1)[start : start + block.numel()] = block.view(-1)
            start += block.numel()
        return whole

    def sha256(self) -> dict[str, str]:
        """Compute the SHA-256 digest of each safetensors file, by file name.

        Raises:
            InputError: a file changed since the checkpoint was opened, or differs from what a hub's cache is to hold.
        """
        digests = {file.name: file_sha256(file) for file in self.files}
        for file in self.files:
            self._check_unchanged(file)
            blob = file.resolve().name  # in a hub's cache, the digest that the hub lists
            if SHA256.fullmatch(blob) and blob != digests[file.name]:
                raise InputError(f"{file}: is not what the hub lists, {blob}; remove that file and fetch it again")
        return digests

    def _check_unchanged(self, file: Path) -> None:
        if _stamp(file) != self._stamps[file]:
            raise InputError(f"{file}: changed while it was read; let its download or training end, then retry")


@dataclass(frozen=True)
class TensorReader:
    """A reader of one tensor of a checkpoint, as a whole or in blocks of rows.

    Attributes:
        checkpoint: the checkpoint that holds the tensor.
        name: the tensor's name in the checkpoint.
    """

    checkpoint: Checkpoint
    name: str

    def __call__(self) -> Tensor:
        """Read the tensor as `Checkpoint.load` does."""
        return self.checkpoint.load(self.name)

    def blocks(self, block_rows: int | None = None) -> Iterator[Tensor]:
        """Read the tensor as `Checkpoint.blocks` does."""
        return self.checkpoint.blocks(self.name, block_rows)


@dataclass(frozen=True)
class ScaledReader:
    """A reader of a weight times powers of two, as a whole or in blocks of rows.

    Attributes:
        read: the weight, [rows, columns] or [columns].
        rows: exponents [rows] int8 of the powers that rows are divided by; None for none.
        columns: exponents [columns] int8 of the powers that columns are multiplied with; None for none.
    """

    read: Callable[[], Tensor]
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __call__(self) -> Tensor:
        """Read the weight in the dtype that `read` gives, but float16 as float32, which holds all products."""
        return self._scaled(self.read(), 0)

    def blocks(self, block_rows: int | None = None) -> Iterator[Tensor]:
        """Yield the same in blocks of so many rows, or of as many as are read at a time."""
        start = 0
        for block in self.read.blocks(block_rows) if isinstance(self.read, BlockReader) else (self.read(),):
            yield self._scaled(block, start)
            start += len(block)

    def _scaled(self, block: Tensor, start: int) -> Tensor:
        block = block.float() if block.dtype == torch.float16 else block
        if self.rows is not None:
            block = torch.ldexp(block, -self.rows[start : start + len(block), None].int()).to(block.dtype)
        return block if self.columns is None else torch.ldexp(block, self.columns.int()).to(block.dtype)


@dataclass(frozen=True)
class IntegerReader:
    """A reader of a matrix whose integers and scales are known already; they are stored as they are.

    Attributes:
        quantized_blocks: reads the matrix in blocks of rows.
        width: bits of its integers, and how many of a row share a scale.
        columns: how many share one if `width` has no group size: those of a row, of the per-layer embeddings those of a
            token and layer.
        rows: reads the rows of ids [T] int64 as [T, columns] float32; None where only whole blocks can be read.
        scales: reads the scales alone, in blocks; None where they are what a backend asked for.
    """

    quantized_blocks: Callable[[], Iterator[Quantized]]
    width: Width
    columns: int
    rows: Callable[[Tensor], Tensor] | None = None
    scales: Callable[[], Iterator[Tensor]] | None = None

    def kept_in(self, asked: Width) -> Width:
        """Return the width in which a bundle has these integers unchanged where its recipe asks for `asked`."""
        kept = held(self.width, asked, self.columns)
        assert kept is not None  # exports refuse such recipes first
        return kept

    def __call__(self) -> Tensor:
        """Return the matrix [rows, columns] float32, integers times scales."""
        return torch.cat(list(self.blocks()))

    def blocks(self, block_rows: int | None = None) -> Iterator[Tensor]:
        """Yield the same in blocks of so many rows, or of as many as are read at a time."""
        rest: tuple[Tensor, ...] = ()
        for quantized in self.quantized_blocks():
            block = torch.cat([*rest, quantized.dequantize()])
            *whole, last = (block,) if block_rows is None else block.split(block_rows)
            yield from whole
            rest = (last,)
        yield from rest


@runtime_checkable
class BlockReader(Protocol):
    """A reader of a matrix that can read it in blocks of rows."""

    def __call__(self) -> Tensor:
        """Read it as a whole."""
        ...

    def blocks(self, block_rows: int | None = None) -> Iterator[Tensor]:
        """Read it in blocks of so many rows; None for as many as fit the memory."""
        ...


def row_blocks(read: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Read a tensor in blocks of rows if the reader can, else as one block.

    Raises:
        InputError: as `Checkpoint.blocks` does.
    """
    return read.blocks() if isinstance(read, BlockReader) else iter((read(),))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, by tensor name, and the offset of the data in bytes."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _stamp(file: Path) -> tuple[int, int, int]:
    """Numbers of which one changes when the file is written to or replaced."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _weight_map(directory: Path, stem: str) -> dict[str, str]:
    """The name of each tensor's file, from the index; empty for a checkpoint of one file."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if is_present(single):
        return {}
    if not is_present(index):
        pickled = sorted(path for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickled:
            raise InputError(
                f"{pickled[0]}: pickled weights are refused, because loading them runs code; convert to safetensors"
            )
        raise InputError(f"{directory}: has neither {single.name} nor {index.name}; download the weights")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: weight_map is missing or empty, expected file names by tensor; download the index again"
        )
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map must give each tensor a file name; download the index again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: names {name!r}, expected a safetensors file in the same directory; download the index again"
            )
        if not is_present(directory / name):
            raise InputError(f"{directory / name}: named in {index.name} but absent; download the shard")
    return weight_map
