"""Helpers of the doctor's tests: experiments' names, engines of changed bundles, and what the doctor finds."""

from collections.abc import Callable, Sequence
from pathlib import Path

from exporter.checkpoint.pair import Pair
from exporter.doctor.diagnosis import diagnose
from runtime_ref.engine import load_engine
from runtime_ref.graph_engine import BoundGraph, GraphEngine
from runtime_ref.manifest import read_manifest
from tests.conftest import Directories

NEW_TOKENS = 8
STATE, ROWS, WINDOW = "state after the final norm", "KV rows", "sliding window"
SOFTCAP, HEAD, KV = "softcap in the drafter", "clusters of the head", "precision of the KV cache"

Bundle = Callable[..., Path]
Pairs = Callable[[str], Directories]


def findings(
    engine: GraphEngine, pair: Pair, prompts: Sequence[Sequence[int]] = (), new_tokens: int = NEW_TOKENS
) -> dict[str, str]:
    """The details of the doctor's findings by experiment, the most likely cause first."""
    return {e.experiment: e.detail for e in diagnose(engine, pair, prompts, new_tokens).findings}


def load_bundle(path: Path, engine_class: type[GraphEngine] = GraphEngine, **graphs: BoundGraph) -> GraphEngine:
    """A bundle's engine, as another class or with other graphs."""
    engine = load_engine(path, read_manifest(path), threads=1)
    return engine_class(engine.manifest, {**engine.graphs, **graphs}, engine.tables)
