"""The doctor names faults that are planted in the runtime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from exporter.checkpoint.pair import Pair, open_pair
from runtime_ref.acceptance import Round
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.sampling import Sampling
from tests.exporter.doctor.engines import KV, ROWS, STATE, Bundle, Pairs, findings, load_bundle


class Stale(GraphEngine):
    """The newest row is that of a rejected draft."""

    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        done = super().verify(last, drafts, sampling)
        if done.accepted < len(drafts):
            for buffer in self.cache.buffers.values():
                row = self.position - self.cache.window_start
                buffer[:, row - 1] = buffer[:, row]
        return done


class NoNewestRow(GraphEngine):
    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        done = super().verify(last, drafts, sampling)
        for buffer in self.cache.buffers.values():
            buffer[:, self.position - 1] = 0
        return done


class NoRollback(GraphEngine):
    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        done = super().verify(last, drafts, sampling)
        self.cache.tokens += drafts[done.accepted :]
        return done


class OldState(GraphEngine):
    """Each round starts from the state of the round before it."""

    newest: np.ndarray | None = None
    begins = True

    def prefill(self, tokens: Sequence[int], *arguments: Any) -> Round:
        self.newest = None
        return super().prefill(tokens, *arguments)

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        self.begins = True
        return super().draft(last, num_draft_tokens)

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        if self.begins:
            self.newest, state = state, state if self.newest is None else self.newest
        self.begins = False
        return super().draft_step(token, state)


class Advancing(GraphEngine):
    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        start = self.position
        drafts = super().draft(last, num_draft_tokens)
        self.cache.roll_back(start)
        return drafts

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        step = super().draft_step(token, state)
        self.cache.tokens.append(token)
        return step


class Moved(GraphEngine):
    def prefill(self, tokens: Sequence[int], *arguments: Any) -> Round:
        done = super().prefill(tokens, *arguments)
        for buffer in self.cache.buffers.values():
            buffer[:, 1 : len(tokens)] = buffer[:, : len(tokens) - 1].copy()
        return done


class HalfCache(GraphEngine):
    def run_target(self, tokens: Any, rows: Any) -> list[np.ndarray]:
        outputs = super().run_target(tokens, rows)
        for buffer in self.cache.buffers.values():
            buffer[:] = buffer.astype(np.float16)
        return outputs


class ByteCache(GraphEngine):
    def run_target(self, tokens: Any, rows: Any) -> list[np.ndarray]:
        outputs, start = super().run_target(tokens, rows), self.position - self.cache.window_start
        for buffer in self.cache.buffers.values():
            new = buffer[:, start : start + len(tokens)]
            scale = np.abs(new).max(-1, keepdims=True) / 127
            new[:] = np.round(new / scale) * scale
        return outputs


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("engine_class", "experiment", "detail"),
    [
        (Stale, ROWS, "1 of the cache's newest"),
        (NoNewestRow, ROWS, "1 of the cache's newest"),
        (NoRollback, ROWS, "the runtime is at position"),
        (OldState, STATE, "rounds start neither from this state nor from the one before the norm"),
        (Advancing, "position", "position and rows in view advance with each draft step"),
        (Moved, ROWS, "the cache's rows lie 1 too far down"),
        (HalfCache, KV, "every number is a float16"),
        (ByteCache, KV, "numbers are close, off what the target wrote by"),
    ],
)
def test_faults_of_the_runtime(
    engine_class: type[GraphEngine], experiment: str, detail: str, bundle: Bundle, odd: Pair
) -> None:
    details = findings(load_bundle(bundle("odd"), engine_class), odd)
    assert list(details) == [experiment]
    assert detail in details[experiment]


@pytest.mark.usefixtures("few_texts")
def test_a_fault_of_the_runtime_shows_beside_rounding(bundle: Bundle, pair_dirs: Pairs) -> None:
    details = findings(load_bundle(bundle("e2b", "onnx", "int4"), ByteCache), open_pair(*pair_dirs("e2b")))
    assert list(details) == [KV]
    assert "numbers are close, off what the target wrote by" in details[KV]
