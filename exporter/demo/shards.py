"""Write checkpoints in safetensors shards, each tensor in pieces, so that none is held whole."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from runtime_ref.manifest import Progress

SHARD_BYTES = 10**9
_ITEM_BYTES = {"BF16": 2, "I64": 8}


@dataclass(frozen=True)
class TensorToWrite:
    """Dtype as safetensors calls it, shape, and the numbers in order; `pieces` is called when it is written."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def write_shards(
    directory: Path,
    tensors: Mapping[str, TensorToWrite],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda *_: None,
) -> None:
    """Write tensors in their order, to one file or to shards with an index; no tensor is split over files."""
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
    """What stands before the numbers: length in 8 bytes, then dtype, shape and place of each tensor, filled to 8 bytes.

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
