"""Graphs on ExecuTorch without PyTorch, by executorch_graphs.cpp: a replacement of runtime_ref.graphs_executorch."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime_ref.errors import InputError
from runtime_ref.graph_engine import BoundGraph
from runtime_ref.manifest import Graph, Manifest

LIBRARY = "libexecutorch_graphs.so"  # on LD_LIBRARY_PATH, beside the libraries that it links to
DTYPES = (np.dtype(np.float32), np.dtype(np.int64))


class Array(ctypes.Structure):
    """The struct `Array` of executorch_graphs.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int32 * 4),
    )


def load_graphs(bundle: Path, manifest: Manifest, threads: int | None) -> dict[str, BoundGraph]:
    """Load the methods of a bundle, as `runtime_ref.graphs_executorch.load_graphs`.

    Raises:
        InputError: ExecuTorch cannot load them.
    """
    library = ctypes.CDLL(LIBRARY)
    library.open_program.restype = library.load_method.restype = ctypes.c_void_p
    file = bundle / manifest.graphs["target"].file
    error = ctypes.c_int()
    program = library.open_program(bytes(file), threads or 1, ctypes.byref(error))
    if not program:
        raise InputError(f"{file}: ExecuTorch cannot load it (error {error.value}); export it again")
    return {name: NativeGraph(library, file, program, name, graph) for name, graph in manifest.graphs.items()}


class NativeGraph:
    """A method, whose cache inputs point into host memory in every call."""

    def __init__(self, library: Any, file: Path, program: int, name: str, graph: Graph) -> None:
        error = ctypes.c_int()
        self._method = library.load_method(ctypes.c_void_p(program), name.encode(), ctypes.byref(error))
        if not self._method:
            raise InputError(f"{file}: ExecuTorch cannot load its method {name} (error {error.value}); export it again")
        self._library, self._file, self._graph = library, file, graph
        self._cache: list[np.ndarray] = []

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Use these cache buffers from now on, as `BoundGraph.bind`."""
        self._cache = [cache[name] for name in self._graph.inputs if name in cache]

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the method, as `BoundGraph.run`, and copy its outputs.

        Raises:
            InputError: the method cannot run.
        """
        arrays = [*(np.ascontiguousarray(array) for array in inputs.values()), *self._cache]
        passed = (Array * len(arrays))(*map(_described, arrays))
        outputs = (Array * len(self._graph.outputs))()
        if error := self._library.run_method(ctypes.c_void_p(self._method), passed, len(passed), outputs, len(outputs)):
            raise InputError(f"{self._file}: cannot run (error {error}); export it again")
        return [_copied(array) for array in outputs]


def _described(array: np.ndarray) -> Array:
    return Array(array.ctypes.data, DTYPES.index(array.dtype), array.ndim, (ctypes.c_int32 * 4)(*array.shape))


def _copied(array: Array) -> np.ndarray:
    shape, dtype = tuple(array.shape[: array.rank]), DTYPES[array.type]
    data = ctypes.string_at(array.data, int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)
