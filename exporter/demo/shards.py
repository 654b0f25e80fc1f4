"""Write checkpoints as safetensors shards, piece by piece, so that no whole tensor is held in memory."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from runtime_ref.manifest import Progress

SHARD_BYTES = 10**9
_ITEM_BYTES = {"BF16": 2, "F32": 4, "I64": 8, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor whose numbers are made while it is written.

    Attributes:
        dtype: a key of `_ITEM_BYTES`, the names of safetensors.
        shape: the tensor's shape.
        pieces: returns contiguous arrays that hold the tensor's numbers, flattened and in order, in the bytes of
            `dtype`.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """Size of the numbers in bytes."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def write_shards(
    directory: Path,
    tensors: Mapping[str, TensorToWrite],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda *_: None,
) -> None:
    """Write tensors in their order, to one file or to several with an index.

    Args:
        directory: an existing directory, which gets `model.safetensors`, or shards and `model.safetensors.index.json`.
        tensors: tensors by name.
        shard_bytes: maximum size of the tensors in one file. A larger tensor gets a file of its own.
        progress: called with the name of each tensor and the number of bytes written.
    """
    shards: list[dict[str, TensorToWrite]] = []
    for name, tensor in tensors.items():
        if not shards or sum(other.size for other in shards[-1].values()) + tensor.size > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as stream:
            stream.write(_header(shard))
            for name, tensor in shard.items():
                for piece in tensor.pieces():
                    stream.write(piece.data)
                    progress(f"{directory.name} {name}", piece.nbytes)
    if len(shards) > 1:
        size = sum(tensor.size for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, TensorToWrite]) -> bytes:
    """Header of a file: its length in 8 bytes, then dtype, shape and offsets of each tensor, padded to 8 bytes.

    Format: https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.size
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
