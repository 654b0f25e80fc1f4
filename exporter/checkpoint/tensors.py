"""Read the safetensors files of a checkpoint directory: names and shapes at once, values a few rows at a time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint.config_json import read_object
from runtime_ref.errors import InputError
from runtime_ref.manifest import file_sha256

FLOAT_DTYPES = ("F32", "F16", "BF16")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
BLOCK_BYTES = 1 << 26  # read at a time: what is made of it on its way to a file takes a few times as much


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and what its file says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The safetensors of one directory: names, dtypes and shapes at once, values on request."""

    def __init__(self, directory: Path) -> None:
        """Raises InputError for missing, pickled, truncated or absent-from-index files."""
        self.directory = directory
        weight_map = _weight_map(directory)
        self.files = [directory / name for name in sorted(set(weight_map.values())) or ["model.safetensors"]]
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            try:
                with safe_open(file, "pt"):  # checks all that a header may get wrong
                    header, data = _header(file)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a readable safetensors file ({error}); download it again") from error
            for name, facts in header.items():
                start, _ = facts["data_offsets"]
                self.entries[name] = TensorEntry(file, facts["dtype"], tuple(facts["shape"]), data + start)
        self._found = {file: _stamp(file) for file in self.files}
        for name, file_name in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file_name:
                raise InputError(f"{directory / file_name}: the index says that {name} is here; download both again")

    def map(self, name: str) -> Tensor:
        """One tensor as it is stored, mapped into memory: what is not touched is not read."""
        self._check_unchanged(self.entries[name].file)
        with safe_open(self.entries[name].file, "pt") as opened:
            return opened.get_tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One tensor in blocks of whole rows, floats as float32.

        They are read, not mapped: what was read of a mapping counts as the process's memory until it is gone.

        Raises:
            InputError: it holds NaN or infinity, or its file changed since it was opened.
        """
        entry = self.entries[name]
        dtype, (rows, *rest) = DTYPES[entry.dtype], entry.shape or (1,)
        row_bytes = prod(rest) * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                block = torch.empty([count, *rest] if entry.shape else [], dtype=dtype)
                stream.readinto(block.view(-1).view(torch.uint8).numpy().data)
                if dtype.is_floating_point:
                    block = block.float()
                    if not block.isfinite().all():
                        raise InputError(f"{entry.file}: tensor {name} holds NaN or infinity; restore the checkpoint")
                yield block
        self._check_unchanged(entry.file)

    def load(self, name: str) -> Tensor:
        """One tensor, floats as float32; raises as `blocks` does."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        whole = torch.empty(entry.shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
        at = 0
        for block in self.blocks(name):
            whole.view(-1)[at : at + block.numel()] = block.view(-1)
            at += block.numel()
        return whole

    def sha256(self) -> dict[str, str]:
        """Digest of every weight file, by file name.

        Raises:
            InputError: a file changed since the checkpoint was opened.
        """
        found = {file.name: file_sha256(file) for file in self.files}
        for file in self.files:
            self._check_unchanged(file)
        return found

    def _check_unchanged(self, file: Path) -> None:
        if _stamp(file) != self._found[file]:
            raise InputError(f"{file}: changed while it was read; let its download or training end, then retry")


@dataclass(frozen=True)
class Stored:
    """A reader of one tensor of a checkpoint, as a whole or in blocks of rows."""

    checkpoint: Checkpoint
    name: str

    def __call__(self) -> Tensor:
        return self.checkpoint.load(self.name)

    def blocks(self) -> Iterator[Tensor]:
        return self.checkpoint.blocks(self.name)


def row_blocks(read: Callable[[], Tensor]) -> Iterator[Tensor]:
    """What a reader reads, in blocks of rows if it can."""
    return read.blocks() if isinstance(read, Stored) else iter((read(),))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's facts on each tensor, and where its data begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    facts = file.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _weight_map(directory: Path) -> dict[str, str]:
    """File of each tensor as the index says; empty for a checkpoint of one file."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return {}
    if not index.exists():
        pickled = sorted(path for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickled:
            raise InputError(
                f"{pickled[0]}: pickled weights are refused, because loading them runs code; convert to safetensors"
            )
        raise InputError(f"{directory}: neither model.safetensors nor {index.name} is there; download the weights")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty; download the index again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map must give each tensor a file name; download the index again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: names {name!r}, expected a safetensors file in the same directory")
        if not (directory / name).exists():
            raise InputError(f"{directory / name}: named in {index.name} but absent; download the shard")
    return weight_map
