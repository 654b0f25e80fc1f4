"""Graphs on ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime_ref.errors import InputError
from runtime_ref.graph_engine import BoundGraph
from runtime_ref.manifest import MANIFEST, Graph, Manifest
from runtime_ref.requirements import require_runtime

FATAL = 4  # severity; errors are raised as well, and must not be printed beside the line that names them

ort.set_default_logger_severity(FATAL)


def load_graphs(bundle: Path, manifest: Manifest, threads: int | None) -> dict[str, BoundGraph]:
    """Load the graphs of a bundle of backend `onnx`.

    Args:
        bundle: directory of the bundle.
        manifest: the bundle's.
        threads: threads inside an operation; None lets ONNX Runtime choose.

    Returns:
        Graphs by the manifest's names.

    Raises:
        InputError: ONNX Runtime is too old, or cannot load them.
    """
    require_runtime(bundle, "onnxruntime", ort.__version__, manifest.min_runtime)
    return {name: OnnxGraph(bundle, graph, threads) for name, graph in manifest.graphs.items()}


class OnnxGraph:
    """A session whose cache inputs and outputs are bound to the same memory, so that it writes in place."""

    def __init__(self, bundle: Path, graph: Graph, threads: int | None) -> None:
        """Load a graph.

        Args:
            bundle: directory of the bundle.
            graph: the manifest's entry.
            threads: threads inside an operation; None lets ONNX Runtime choose.

        Raises:
            InputError: ONNX Runtime cannot load the graph.
        """
        self._file = bundle / graph.file
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        if threads is not None:
            options.intra_op_num_threads = threads
        # A spinning thread pool starves whatever shares the machine, or the phone.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(self._file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            home = self._file.resolve().parent
            if links := sorted(file for file in bundle.iterdir() if file.resolve().parent != home):
                raise InputError(
                    f"{links[0]}: is a link to another directory than that of {graph.file}, from which ONNX Runtime"
                    " reads no weights; copy the file itself into the bundle"
                ) from error
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{bundle / graph.file}: ONNX Runtime {ort.__version__} cannot load it ({reason});"
                " install a newer onnxruntime, or export the bundle again"
            ) from error
        if {port.name for port in self._session.get_inputs()} != {*graph.inputs}:
            raise InputError(f"{self._file}: has other inputs than {MANIFEST} says; export the bundle again")
        self._graph = graph
        self._binding: Any = self._session.io_binding()
        self._cache: dict[str, np.ndarray] = {}

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Bind each cache buffer to its input and, where the graph updates it, to its output; see `BoundGraph.bind`."""
        self._binding = self._session.io_binding()
        self._cache = dict(cache)  # keeps the memory alive that the binding points into
        for name in self._graph.inputs:
            if (array := cache.get(name)) is not None:
                self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in self._graph.outputs:
            if (array := cache.get(name.removesuffix("_out"))) is not None:
                self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph, as `BoundGraph.run`.

        Raises:
            InputError: the graph cannot run; that of an intact bundle can.
        """
        fresh = [name for name in self._graph.outputs if name.removesuffix("_out") not in self._cache]
        try:
            for name, array in inputs.items():
                self._binding.bind_cpu_input(name, array)
            for name in fresh:
                self._binding.bind_output(name, "cpu")  # each time: a bound output keeps the shape of its first run
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise InputError(f"{self._file}: cannot run ({str(error).splitlines()[0]}); export it again") from error
        # Outputs come in the order in which they were first bound: the cache, then the rest.
        return [value.numpy() for value in self._binding.get_outputs()[-len(fresh) :]]
