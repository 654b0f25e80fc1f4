"""The engine that the decoding loop runs on, and loading one from a bundle."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from runtime_ref.acceptance import Round
from runtime_ref.cache import Cache
from runtime_ref.checked_files import first_changed_file
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import MANIFEST, Manifest, Progress, read_manifest
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet
from runtime_ref.sampling import Chooser
from runtime_ref.tables import Table

# Backend -> the module with its `load_graphs`, imported when a bundle needs it: a runtime may not be installed.
MAX_THREADS = 256  # more than any phone or build machine has cores for; thousands bring a machine down
GRAPH_MODULES = {"onnx": "runtime_ref.graphs_onnx", "executorch": "runtime_ref.graphs_executorch"}


class Engine(Protocol):
    """A loaded bundle: its graphs, and the KV cache that they run over.

    Attributes:
        manifest: the bundle's.
        cache: the KV cache, with the state that drafting starts from. The newest token of a text is not in it yet.
            Another of the same bundle may take its place between two passes.
    """

    manifest: Manifest
    cache: Cache

    def prefill(
        self, tokens: Sequence[int], sampling: Chooser, start: int = 0, go_on: Callable[[int], bool] = lambda _: True
    ) -> Round:
        """Run a prompt in chunks and choose the token after it.

        Whatever ends it early, the cache has the tokens of the last chunk that was run to its end.

        Args:
            tokens: token ids of the whole prompt, at least one.
            sampling: chooses the token.
            start: how many of the tokens are in the cache already, fewer than all of them.
            go_on: called before the first chunk and after each with how many of the tokens are in the cache; returns
                whether to go on.

        Returns:
            A round without drafts, of one token; of none if `go_on` returned False.
        """
        ...

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Return draft tokens after the newest token.

        Args:
            last: id of the newest token, which is not in the cache yet.
            num_draft_tokens: K; 0 gives an empty list.
        """
        ...

    def verify(self, last: int, drafts: Sequence[int], sampling: Chooser) -> Round:
        """Run the newest token and the drafts after it, accept drafts, and roll the cache back.

        Args:
            last: id of the newest token, which is not in the cache yet.
            drafts: K draft tokens; none is plain decoding.
            sampling: chooses the tokens. It is asked row after row, up to the first token that is no draft.

        Returns:
            The round, of 1 to K+1 tokens.
        """
        ...

    def score(self, state: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """Compute logits of any tokens from a state and the target's head, in float64.

        Where the graph rounds what it multiplies with the head, its own logits differ from these by that rounding.
        Suppressed tokens of the bundle get their logits like any other.

        Args:
            state: [E] float32, the target's, as `Chooser.pick` gets it.
            ids: n token ids.

        Returns:
            [n] float32, after the softcap.
        """
        ...

    def close(self) -> None:
        """Free what the bundle takes in memory; nothing can be run afterwards."""
        ...


def open_engine(
    bundle: Path,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
    digest: str | None = None,
    verify: bool = False,
) -> GraphEngine:
    """Load a bundle after checking its files against the manifest, as `checked_files.first_changed_file`.

    Args:
        bundle: directory written by `export`.
        threads: threads inside an operation; None lets the backend choose.
        progress: called with the name of a file and the number of its bytes that were checked since the last call.
        digest: hexadecimal sha256 that the manifest must have; None for any.
        verify: whether to read every file, not only those that may have changed since they were read.

    Raises:
        InputError: not a bundle, another one than `digest` says, incomplete, changed since it was exported, in need of
            what this version does not know, or for a backend that is not installed.
    """
    manifest = read_manifest(bundle, digest)
    if changed := first_changed_file(bundle, manifest, progress, verify):
        raise InputError(f"{bundle / changed}: sha256 differs from the manifest's; export or copy the bundle again")
    return load_engine(bundle, manifest, threads)


def load_engine(bundle: Path, manifest: Manifest, threads: int | None = None) -> GraphEngine:
    """Load a bundle whose files are trusted already.

    Args:
        bundle: directory written by `export`.
        manifest: the bundle's.
        threads: threads inside an operation; None lets the backend choose.

    Raises:
        InputError: `threads` is none from 1 to `MAX_THREADS`, the backend is unknown or not installed, its runtime
            cannot load the graphs, or the tables do not fit the manifest.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads is {threads}, expected 1 to {MAX_THREADS}")
    if manifest.backend not in GRAPH_MODULES:
        raise InputError(
            f"{bundle}: made for backend {manifest.backend!r}, expected {' or '.join(GRAPH_MODULES)}; export it for"
            " one of these"
        )
    try:
        with quiet(*EXECUTORCH_LOGGERS):
            module = importlib.import_module(GRAPH_MODULES[manifest.backend])
    except ImportError as error:
        extra = "" if manifest.backend == "onnx" else f"[{manifest.backend}]"
        raise InputError(
            f"{bundle}: the runtime of its backend {manifest.backend} cannot be imported ({error}); pip install"
            f" 'gemma-mtp-export{extra}'"
        ) from error
    try:
        tables = {name: Table(bundle, entry) for name, entry in manifest.tables.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{bundle / MANIFEST}: tables are malformed ({reason}); export the bundle again") from error
    return GraphEngine(manifest, module.load_graphs(bundle, manifest, threads), tables)
