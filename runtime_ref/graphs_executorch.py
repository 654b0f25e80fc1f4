"""Graphs on ExecuTorch: methods of one program, which read and write the cache in host memory by pointer."""

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251 - ExecuTorch's Python runtime takes and returns torch tensors
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

from runtime_ref.errors import InputError
from runtime_ref.graph_engine import BoundGraph
from runtime_ref.manifest import Graph, Manifest
from runtime_ref.requirements import require_runtime


def load_graphs(bundle: Path, manifest: Manifest, threads: int | None) -> dict[str, BoundGraph]:
    """Load the methods of a bundle of backend `executorch`.

    Args:
        bundle: directory of the bundle.
        manifest: the bundle's.
        threads: threads of the pool that the whole process shares; None keeps the pool as it is, at first one thread
            for each fast core.

    Returns:
        Graphs by the manifest's names.

    Raises:
        InputError: ExecuTorch is too old or cannot load them, or another bundle is loaded with another number of
            threads.
    """
    require_runtime(bundle, "executorch", version("executorch"), manifest.min_runtime)
    with _native_notes_hidden():
        current = portable_lib._threadpool_get_thread_count()
        if threads is not None and threads != current:
            if _loaded:  # their methods point to the pool, which would be freed
                raise InputError(
                    f"{bundle}: asked for {threads} threads while another bundle is loaded with {current}; ExecuTorch"
                    " has one pool a process, so ask for the same number or release the other engine first"
                )
            portable_lib._unsafe_reset_threadpool(threads)
        programs = {file: _load(bundle / file) for file in {graph.file for graph in manifest.graphs.values()}}
        return {
            name: ExecuTorchGraph(bundle, name, graph, programs[graph.file]) for name, graph in manifest.graphs.items()
        }


_loaded: "weakref.WeakSet[ExecuTorchGraph]" = weakref.WeakSet()


class ExecuTorchGraph:
    """A method, whose cache inputs point into host memory in every call."""

    def __init__(self, bundle: Path, name: str, graph: Graph, program: Any) -> None:
        """Load a method.

        Args:
            bundle: directory of the bundle.
            name: the graph's name, which is the method's.
            graph: the manifest's entry.
            program: the loaded .pte file.

        Raises:
            InputError: ExecuTorch cannot load the method.
        """
        self._file, self._graph = bundle / graph.file, graph
        self._program = program  # held here: a method does not keep its program alive
        try:
            self._method = program.load_method(name)
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{self._file}: ExecuTorch cannot load its method {name} ({_line(error)})") from error
        self._cache: list[torch.Tensor] = []
        _loaded.add(self)

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Use these cache buffers from now on, as `BoundGraph.bind`."""
        self._cache = [torch.from_numpy(cache[name]) for name in self._graph.inputs if name in cache]

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the method, as `BoundGraph.run`.

        Raises:
            InputError: the method cannot run; that of an intact bundle can.
        """
        tensors = [torch.from_numpy(array) for array in inputs.values()]
        try:
            outputs = self._method.execute([*tensors, *self._cache])
        except RuntimeError as error:
            raise InputError(f"{self._file}: cannot run ({_line(error)}); export it again") from error
        return [output.numpy() for output in outputs]


def _load(file: Path) -> Any:
    try:
        return Runtime.get().load_program(file)
    except RuntimeError as error:
        raise InputError(f"{file}: ExecuTorch cannot load it ({_line(error)}); export it again") from error


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _native_notes_hidden() -> Iterator[None]:
    """Silence ExecuTorch's notes on the machine: it writes them to file descriptor 2, and no setting turns them off."""
    try:
        kept = os.dup(2)
    except OSError:  # the descriptor is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
