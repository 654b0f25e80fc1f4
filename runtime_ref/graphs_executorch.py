"""Graphs on ExecuTorch: methods of one program, which take the cache by pointer and write into it."""

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251 - what ExecuTorch's Python runtime takes and gives
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime

from runtime_ref.errors import InputError
from runtime_ref.graph_engine import BoundGraph
from runtime_ref.manifest import Graph, Manifest


def load_graphs(bundle: Path, manifest: Manifest, threads: int | None) -> dict[str, BoundGraph]:
    """Load the methods of a bundle of backend `executorch`.

    Args:
        threads: threads of the pool that the whole process shares; None keeps the pool as it is, at first one thread
            for each fast core.

    Raises:
        InputError: ExecuTorch cannot load them, or another bundle is loaded with another number of threads.
    """
    with _native_notes_hidden():
        current = portable_lib._threadpool_get_thread_count()
        if threads is not None and threads != current:
            if _loaded:  # they point to the pool, which would be gone
                raise InputError(
                    f"{bundle}: asked for {threads} threads while another bundle is loaded with {current}; ExecuTorch"
                    " has one pool a process, so ask for the same or let go of the other engine first"
                )
            portable_lib._unsafe_reset_threadpool(threads)
        programs = {file: _load(bundle / file) for file in {graph.file for graph in manifest.graphs.values()}}
        return {
            name: ExecuTorchGraph(bundle, name, graph, programs[graph.file]) for name, graph in manifest.graphs.items()
        }


_loaded: "weakref.WeakSet[ExecuTorchGraph]" = weakref.WeakSet()


class ExecuTorchGraph:
    """A method; its cache inputs point into the host's memory with every call."""

    def __init__(self, bundle: Path, name: str, graph: Graph, program: Any) -> None:
        self._file, self._graph = bundle / graph.file, graph
        self._program = program  # a method does not keep its program alive
        try:
            self._method = program.load_method(name)
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{self._file}: ExecuTorch cannot load its method {name} ({_line(error)})") from error
        self._cache: list[torch.Tensor] = []
        _loaded.add(self)

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self._cache = [torch.from_numpy(cache[name]) for name in self._graph.inputs if name in cache]

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs in the graph's order.

        Raises:
            InputError: the method cannot run, which no sound bundle's does.
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
    """ExecuTorch writes notes on the machine straight to file descriptor 2 while it starts; nothing turns them off."""
    try:
        kept = os.dup(2)
    except OSError:  # closed: nobody would see them
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
