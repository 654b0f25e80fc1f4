"""Keep how far a measurement of bits is, so that a killed one goes on where it was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from exporter.calibration.steps import Steps
from exporter.files import write_file
from exporter.modeling.target import TargetPass


@dataclass(frozen=True)
class KeptCosts:
    """A directory with the passes of texts after the last layer that was run, and what was measured since.

    Attributes:
        directory: the directory; None to keep nothing.
    """

    directory: Path | None

    @classmethod
    def open(cls, directory: Path | None, key: Mapping[str, Any]) -> "KeptCosts":
        """Open a directory, made if it does not exist; its files stay if they were made with the same key, as JSON."""
        return cls(None if directory is None else Steps.open(directory, key).directory)

    def write_passes(self, layers: int, passes: Mapping[str, list[TargetPass]]) -> None:
        """Write hidden states, K and V of passes, by name, after so many layers."""
        if self.directory is not None:
            tensors = {name: tensor.contiguous() for name, (tensor, _, _) in _parts(passes, layers).items()}
            write_file(self.directory / "passes.safetensors", save(tensors, {"layers": str(layers)}))

    def read_passes(self, passes: Mapping[str, list[TargetPass]]) -> int:
        """Put kept passes in the place of those before the first layer; return after how many layers they are."""
        if self.directory is None:
            return 0
        try:
            with safe_open(self.directory / "passes.safetensors", "pt") as opened:
                layers = int(opened.metadata()["layers"])
                for name, (_, run, i) in _parts(passes, layers).items():
                    if i is None:
                        run.x = opened.get_tensor(name)
                    else:
                        run.kv[i] = opened.get_tensor(name)
                return layers
        except (SafetensorError, OSError):
            return 0

    def write_costs(self, costs: Mapping[str, tuple[float, float]]) -> None:
        """Write pairs of KL and kept choices, by name."""
        if self.directory is not None:
            write_file(self.directory / "costs.json", json.dumps(costs).encode())

    def read_costs(self) -> dict[str, tuple[float, float]]:
        """Read what `write_costs` wrote last; nothing if it never did."""
        path = None if self.directory is None else self.directory / "costs.json"
        found = json.loads(path.read_bytes()) if path is not None and path.is_file() else {}
        return {name: (kl, kept) for name, (kl, kept) in found.items()}


def _parts(passes: Mapping[str, list[TargetPass]], layers: int) -> dict[str, tuple[Tensor, TargetPass, int | None]]:
    """The tensors that so many layers changed, by name, with their pass and, of K and V, their place in its list."""
    parts: dict[str, tuple[Tensor, TargetPass, int | None]] = {}
    for name, texts in passes.items():
        for text, run in enumerate(texts):
            parts[f"{name}.{text}"] = run.x, run, None
            parts |= {f"{name}.{text}.{i}": (kv, run, i) for i, kv in enumerate(run.kv[: 2 * layers])}
    return parts
