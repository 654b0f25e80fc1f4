"""The contract between the exporter and its backends, which each write the graphs of a bundle for one runtime."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from runtime_ref.errors import InputError
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet

if TYPE_CHECKING:  # these import torch, and the command line needs the names of backends alone
    from torch import Tensor

    from exporter.checkpoint.pair import Pair
    from exporter.checkpoint.tensors import IntegerReader
    from exporter.graphs.parts import GraphParts
    from exporter.graphs.spec import GraphSpec
    from exporter.quantization.numbers import Quantized, Scales
    from exporter.quantization.widths import Width
    from runtime_ref.manifest import Progress

# The module of each backend; it has the functions of `Backend`.
BACKENDS = {"onnx": "exporter.graphs.onnx", "executorch": "exporter.graphs.executorch"}


@dataclass(frozen=True)
class ExportedGraphs:
    """What the manifest needs to know about graphs that a backend has written.

    Attributes:
        backend_metadata: further entries of the manifest's `backend`.
        head_table: an entry of the manifest's `tables`, as `exporter.graphs.tables.table_metadata` makes it: where in
            the written files the rows of the target's head lie, which is the token embedding in most pairs.
    """

    backend_metadata: dict[str, Any]
    head_table: dict[str, Any]


class Backend(Protocol):
    """The functions of a backend's module. FORMAT.md specifies what of this goes into a bundle's manifest."""

    def backend_metadata(self) -> dict[str, Any]:
        """Return the manifest's `backend`: its name and versions."""
        ...

    def graph_specs(self, pair: "Pair") -> dict[str, tuple[str, "GraphSpec"]]:
        """Return the file name and the inputs and outputs of each graph, by graph name."""
        ...

    def row_multiples(self) -> dict[str, int]:
        """Return `row_multiple`, and `row_multiple_arm64` if that differs, as manifest keys.

        `num_tokens` and `num_outputs` of every pass must be multiples of it.
        """
        ...

    def supported_scales(self) -> "Scales":
        """Return the dtype and the signs that scales of 4-bit weights can have."""
        ...

    def rounded_inputs(self, x: "Tensor", weight: "Quantized") -> "Tensor":
        """Return inputs x [T, columns] of a quantized matrix as its kernel rounds them."""
        ...

    def matrix_bytes(self, shape: tuple[int, ...], width: "Width") -> int:
        """Return the bytes of a matrix [rows, columns] in a graph's file, with its scales."""
        ...

    def export_memory_bytes(self, parts: "Mapping[str, GraphParts]") -> int:
        """Estimate the peak memory in bytes of exporting these graphs."""
        ...

    def check_file_size(self, parts: "Mapping[str, GraphParts]", max_file_bytes: int) -> None:
        """Check that weights can be split into files of at most so many bytes.

        Raises:
            InputError: what must lie in one file is larger.
        """
        ...

    def export_graphs(
        self,
        directory: Path,
        pair: "Pair",
        parts: "Mapping[str, GraphParts]",
        limits: Mapping[str, int],
        max_file_bytes: int | None,
        progress: "Progress",
    ) -> ExportedGraphs:
        """Write graphs and weights.

        Args:
            directory: an existing directory to write to.
            pair: the target and its drafter.
            parts: what to write for each graph of `graph_specs`, by graph name.
            limits: maximum size of each varying dimension, from `exporter.graphs.spec.size_limits`.
            max_file_bytes: largest size of each file of weights; None for one file a graph.
            progress: called with what is being written and how many bytes of float32 weights were processed.
        """
        ...

    def differing_weights(self, parts: "Mapping[str, GraphParts]", files: Mapping[str, Path]) -> dict[str, list[str]]:
        """Compare stored weights with those that an export would write.

        Args:
            parts: what each graph should hold, by graph name.
            files: file of each graph, by graph name.

        Returns:
            For each graph the names of weights that its file does not hold bit for bit.
        """
        ...

    def stored_integers(
        self, part: "GraphParts", file: Path, names: Sequence[str], metadata: Mapping[str, Any]
    ) -> "dict[str, IntegerReader]":
        """Return readers of 4-bit matrices that a bundle holds, for those that no checkpoint determines.

        Args:
            part: the graph's module, widths and shapes.
            file: the graph's file.
            names: the matrices, which the graph has.
            metadata: the manifest's `backend`.

        Raises:
            KeyError: the file does not hold one of them.
        """
        ...


def load_backend(name: str) -> Backend:
    """Import a backend's module, which takes seconds, so it happens only when the backend is used.

    Args:
        name: a key of `BACKENDS`.

    Raises:
        InputError: a package that the backend needs cannot be imported.
    """
    with quiet(*EXECUTORCH_LOGGERS):
        try:
            return cast(Backend, importlib.import_module(BACKENDS[name]))
        except ImportError as error:
            raise InputError(
                f"--backend {name}: cannot be imported ({error}); pip install 'gemma-mtp-export[all]'"
            ) from error
