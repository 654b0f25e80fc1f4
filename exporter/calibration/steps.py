"""Keep what each step of a calibration gives in a file of its own, so that a killed one goes on where it was."""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from exporter.checkpoint.folding import folding_bytes
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import BLOCK_BYTES
from exporter.quantization.numbers import Quantized, Scales

_KEY = "key.json"


def key_of(pair: Pair, allowed: Scales) -> dict[str, Any]:
    """Return, as JSON, what results depend on besides texts: versions, processor, the backend's scales, checkpoint."""
    return {
        "versions": [version("gemma-mtp-export"), torch.__version__],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "scales": str(allowed),
        "activations": pair.rounds_activations,
        "target": asdict(pair.target),
        "files": pair.stamps,
        "folding": hashlib.sha256(folding_bytes(pair.folding)).hexdigest(),
    }


@dataclass(frozen=True)
class Steps:
    """A directory with a safetensors file for each finished step: integers and scales of its matrices.

    Attributes:
        directory: the directory.
    """

    directory: Path

    @classmethod
    def open(cls, directory: Path, key: Mapping[str, Any]) -> "Steps":
        """Open a directory; what is in it is kept if it was made with the same key, else it is removed.

        Args:
            directory: made if it does not exist; what else has its name is removed.
            key: what the results depend on, as JSON.
        """
        path, content = directory / _KEY, json.dumps(key).encode()
        if not path.is_file() or path.read_bytes() != content:
            if directory.is_dir() and not directory.is_symlink():
                shutil.rmtree(directory)
            else:
                directory.unlink(missing_ok=True)
            directory.mkdir(parents=True)
            path.write_bytes(content)
        return cls(directory)

    def read(self, step: str) -> dict[str, Quantized] | None:
        """Return the matrices of a step by name; None if it is not finished."""
        try:
            with safe_open(self._file(step), "pt") as opened:
                bits = opened.metadata()
                return {
                    name: Quantized(opened.get_tensor(f"{name}.numbers"), opened.get_tensor(f"{name}.scales"), int(b))
                    for name, b in bits.items()
                    if name != "format"
                }
        except (SafetensorError, OSError):
            return None

    def write(self, step: str, matrices: Mapping[str, Quantized]) -> None:
        """Write the matrices of a step, by name."""
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            tensors |= {f"{name}.numbers": matrix.numbers.contiguous(), f"{name}.scales": matrix.scales.contiguous()}
        partial = self._file(step).with_suffix(".partial")
        bits = {name: str(matrix.bits) for name, matrix in matrices.items()}
        partial.write_bytes(save(tensors, bits | {"format": "pt"}))  # save_file does not say that a disk is full
        partial.replace(self._file(step))

    def blocks(self, step: str, name: str) -> Iterator[Quantized]:
        """Read a matrix of a finished step in blocks of rows."""
        with safe_open(self._file(step), "pt") as opened:
            numbers, scales = opened.get_slice(f"{name}.numbers"), opened.get_slice(f"{name}.scales")
            rows, columns = numbers.get_shape()
            block_rows = max(1, BLOCK_BYTES // (4 * columns))
            for start in range(0, rows, block_rows):
                block = slice(start, min(start + block_rows, rows))
                yield Quantized(numbers[block], scales[block], int(opened.metadata()[name]))

    def _file(self, step: str) -> Path:
        return self.directory / f"{step}.safetensors"
