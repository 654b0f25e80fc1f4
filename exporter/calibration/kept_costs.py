"""Keep how far a measurement of bits is, so that a killed one goes on where it was."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from exporter.calibration.steps import Steps
from exporter.files import write_file
from exporter.modeling.target import TargetPass
from runtime_ref.errors import InputError


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
        """Write hidden states, K and V of passes, by name, after so many layers.

        Raises:
            InputError: they cannot be written.
        """
        if self.directory is None:
            return
        partial, before = self.directory / "partial", _layers(self.directory)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for i, runs in enumerate(passes.values()):  # a file for each, because `save` doubles the memory
                (partial / f"{i}.safetensors").write_bytes(save(_tensors(runs, layers)))
            partial.rename(self.directory / f"layers-{layers}")
            for path in before.values():
                shutil.rmtree(path)
        except OSError as error:
            raise InputError(
                f"{self.directory}: cannot be written ({error.strerror}); free some space, and run the same command"
                " again: it goes on where it was"
            ) from error

    def read_passes(self, passes: Mapping[str, list[TargetPass]]) -> int:
        """Put kept passes in the place of those before the first layer; return after how many layers they are."""
        kept = {} if self.directory is None else _layers(self.directory)
        if not kept:
            return 0
        layers = max(kept)
        try:
            tensors = [load_file(kept[layers] / f"{i}.safetensors") for i in range(len(passes))]
            for runs, found in zip(passes.values(), tensors, strict=True):
                for i, run in enumerate(runs):
                    run.x = found[f"{i}.x"]
                    run.kv[: 2 * layers] = [found[f"{i}.{j}"] for j in range(len(run.kv[: 2 * layers]))]
        except (SafetensorError, OSError, LookupError) as error:
            raise InputError(f"{kept[layers]}: cannot be read ({error}); remove it") from error
        return layers

    def write_costs(self, costs: Mapping[str, tuple[float, float]]) -> None:
        """Write pairs of KL and kept choices, by name."""
        if self.directory is not None:
            write_file(self.directory / "costs.json", json.dumps(costs).encode())

    def read_costs(self) -> dict[str, tuple[float, float]]:
        """Read what `write_costs` wrote last; nothing if it never did."""
        if self.directory is None:
            return {}
        try:
            found = json.loads((self.directory / "costs.json").read_bytes())
            return {name: (float(kl), float(kept)) for name, (kl, kept) in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def _layers(directory: Path) -> dict[int, Path]:
    """Where passes are kept, by the number of layers that were run."""
    return {int(path.name.removeprefix("layers-")): path for path in directory.glob("layers-*")}


def _tensors(runs: list[TargetPass], layers: int) -> dict[str, Tensor]:
    """What so many layers changed in passes, by name."""
    tensors = {}
    for i, run in enumerate(runs):
        tensors[f"{i}.x"] = run.x.contiguous()
        tensors |= {f"{i}.{j}": kv.contiguous() for j, kv in enumerate(run.kv[: 2 * layers])}
    return tensors
