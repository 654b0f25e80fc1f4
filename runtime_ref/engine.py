"""What the decoding loop asks of a backend, and how a bundle's engine is opened."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from runtime_ref.acceptance import Round
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import MANIFEST, TABLES, Manifest, Progress, changed_files, read_manifest
from runtime_ref.quiet import EXECUTORCH, quiet
from runtime_ref.sampling import Sampling
from runtime_ref.tables import Table

# Backend -> the module with its `load_graphs`; imported only when a bundle asks for it.
GRAPH_MODULES = {"onnx": "runtime_ref.graphs_onnx", "executorch": "runtime_ref.graphs_executorch"}


class Engine(Protocol):
    """A bundle, loaded: the KV cache, `position` (rows valid in it), and the state that drafting starts from."""

    manifest: Manifest
    position: int

    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0) -> Round:
        """Start a text whose tokens before `start` are in the cache already; the round has the choice after it."""
        ...

    def keeps(self, position: int) -> bool:
        """Whether the cache still has all that tokens from this position on may see."""
        ...

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Draft tokens after `last`, the newest token, which is not in the cache yet."""
        ...

    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        """Run `last` and any drafts after it, accept, roll back. With no drafts this is plain decoding."""
        ...


def open_engine(bundle: Path, threads: int | None = None, progress: Progress = lambda *_: None) -> GraphEngine:
    """Load a bundle after checking every file against the manifest.

    Args:
        bundle: directory written by `export`.
        threads: threads inside an operation; None lets the backend choose.
        progress: told of the files as they are checked.

    Raises:
        InputError: not a bundle, incomplete, changed since it was exported, or for a backend that is not installed.
    """
    manifest = read_manifest(bundle)
    if changed := changed_files(bundle, manifest, progress):
        raise InputError(f"{bundle / changed[0]}: sha256 differs from the manifest's; export or copy the bundle again")
    return load_engine(bundle, manifest, threads)


def load_engine(bundle: Path, manifest: Manifest, threads: int | None = None) -> GraphEngine:
    """Load a bundle whose files are trusted already.

    Raises:
        InputError: for a backend that is not installed, or its runtime refuses the graphs.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1")
    if manifest.backend not in GRAPH_MODULES:
        raise InputError(
            f"{bundle}: made for backend {manifest.backend!r}, this version runs {' and '.join(GRAPH_MODULES)}"
        )
    try:
        with quiet(*EXECUTORCH):
            module = importlib.import_module(GRAPH_MODULES[manifest.backend])
    except ImportError as error:
        raise InputError(f"{bundle}: the runtime of its backend cannot be imported ({error}); install it") from error
    try:
        tables = {name: Table(bundle, manifest.tables[name]) for name in TABLES}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{bundle / MANIFEST}: tables are malformed ({reason}); export the bundle again") from error
    return GraphEngine(manifest, module.load_graphs(bundle, manifest, threads), tables)
