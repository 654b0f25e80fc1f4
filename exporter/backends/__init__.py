"""The runtimes that a bundle can be made for. Each module has the functions of `Backend`."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from exporter.graphs import GraphSpec
from exporter.pair import Pair
from exporter.parts import GraphParts
from exporter.quantize import Scales
from exporter.tables import Exported
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet

BACKENDS = ("onnx", "executorch")


class Backend(Protocol):
    """What a backend's module offers."""

    def runtime(self) -> dict[str, Any]:
        """What the manifest says of the backend."""
        ...

    def graph_specs(self, pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
        """File, and inputs and outputs, of each graph."""
        ...

    def row_multiples(self) -> dict[str, int]:
        """What the tokens and the output rows of each pass must be a multiple of, as the manifest has it."""
        ...

    def scales(self) -> Scales:
        """What the scales of 4-bit weights can be."""
        ...

    def memory(self, parts: Mapping[str, GraphParts]) -> int:
        """Bytes that exporting graphs takes at its peak, about."""
        ...

    def export_graphs(
        self,
        directory: Path,
        pair: Pair,
        parts: Mapping[str, GraphParts],
        limits: Mapping[str, int],
        progress: Progress,
    ) -> Exported:
        """Write graphs and weights."""
        ...

    def differing_weights(self, parts: Mapping[str, GraphParts], files: Mapping[str, Path]) -> dict[str, list[str]]:
        """For each graph the names of weights that its file does not hold bit for bit."""
        ...


def load_backend(name: str) -> Backend:
    """A backend's module; it is imported only when it is asked for, because it takes seconds.

    Raises:
        InputError: a package that it needs cannot be imported.
    """
    with quiet(*EXECUTORCH_LOGGERS):
        try:
            return cast(Backend, importlib.import_module(f"exporter.backends.{name}"))
        except ImportError as error:
            raise InputError(f"--backend {name}: cannot be imported ({error}); install this package again") from error
