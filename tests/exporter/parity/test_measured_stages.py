"""Parity sees what an engine computes wrongly: files, weights and manifest of these bundles are right."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint.pair import open_pair
from exporter.parity import stages
from runtime_ref.engine import load_engine
from runtime_ref.graph_engine import GraphEngine

OUTPUTS = {"logits": 0, "ids": 1, "state": 2}  # of a pass of the target


def after(engine: GraphEngine, method: str, change: Callable[[Any, Sequence[Any]], Any]) -> None:
    """Change what a method of an engine returns; the change also gets the method's arguments."""
    real = getattr(engine, method)
    setattr(engine, method, lambda *arguments: change(real(*arguments), arguments))


def with_output(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[GraphEngine], None]:
    """Change an output of the target."""

    def changed(outputs: list[np.ndarray], _: object) -> list[np.ndarray]:
        return [change(output) if i == OUTPUTS[name] else output for i, output in enumerate(outputs)]

    return lambda engine: after(engine, "run_target", changed)


def with_other_drafts(engine: GraphEngine) -> None:
    after(engine, "draft_step", lambda step, _: (step[0] ^ 1, step[1]))


def with_other_states_of_drafts(engine: GraphEngine) -> None:
    after(engine, "draft_step", lambda step, _: (step[0], step[1] * np.float32(1.01)))


def with_another_token_after_drafts(engine: GraphEngine) -> None:
    """Only a pass with drafts goes wrong."""

    def changed(found: Any, arguments: Sequence[Any]) -> Any:
        return found if not arguments[1] else replace(found, tokens=[*found.tokens[:-1], found.tokens[-1] ^ 1])

    after(engine, "verify", changed)


def with_another_row(engine: GraphEngine) -> None:
    rows = np.array(engine.tables["embed_tokens"][list(range(engine.manifest.vocab_size))])
    rows[0, 0] += 1
    engine.tables = {**engine.tables, "embed_tokens": rows}


def with_a_scaled_cache(engine: GraphEngine) -> None:
    def changed(outputs: list[np.ndarray], _: object) -> list[np.ndarray]:
        for buffer in engine.cache.buffers.values():
            buffer[:, : engine.position] *= np.float32(1.01)
        return outputs

    after(engine, "run_target", changed)


# What is wrong, how, and the outputs whose checks fail then.
FAULTS: dict[str, tuple[Callable[[GraphEngine], None], set[str]]] = {
    "logits": (
        with_output("logits", lambda logits: logits * np.float32(1.01)),
        {"top logits", "logits at top ids"},
    ),
    "best token": (
        with_output("ids", lambda ids: np.concatenate((ids[:, 1:2], ids[:, :1], ids[:, 2:]), 1)),
        {"tokens = eager", "logits at top ids"},
    ),
    "state": (with_output("state", lambda state: state * np.float32(1.01)), {"state"}),
    "cache": (with_a_scaled_cache, {"KV cache, full layers", "KV cache, sliding layers", "draft state"}),
    "states of drafts": (with_other_states_of_drafts, {"draft state"}),
    "drafts": (with_other_drafts, {"draft tokens"}),
    "passes with drafts": (with_another_token_after_drafts, {"greedy tokens = plain", "sampled tokens = plain"}),
    "table": (with_another_row, {"embedding rows"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees_a_fault_of_the_engine(
    fault: str,
    bundle: Callable[..., Path],
    pair_dirs: Callable[[str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, expected = FAULTS[fault]

    def faulty(*arguments: Any, **options: Any) -> GraphEngine:
        engine = load_engine(*arguments, **options)
        assert isinstance(engine, GraphEngine)
        change(engine)
        return engine

    monkeypatch.setattr(stages, "load_engine", faulty)
    checks = stages.run_parity(bundle("dense"), open_pair(*pair_dirs("dense")), [[5], [3, 4, 9]], 6)
    assert {check.output for check in checks if not check.passed} == expected
