"""The engine's cache against a list: prompts, rounds and rollbacks in any order, on graphs that hash what they see."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from runtime_ref.cache import Cache, allocate
from runtime_ref.manifest import SLIDE_ROWS, KVBuffer
from runtime_ref.sampling import Sampling
from tests.runtime_ref.fake_graphs import MAX_DRAFTS, VOCAB, WINDOW, continuation, fake_engine

# Tokens after which the sliding buffer may begin a step later than before.
KEPT_AT_A_MOVE = st.sampled_from([SLIDE_ROWS * steps + WINDOW + more for steps in (1, 2, 3) for more in range(-3, 4)])


def short_of_memory(left: int) -> Callable[[KVBuffer, int], np.ndarray]:
    """An allocator that gives so many buffers."""

    def give(kv: KVBuffer, rows: int) -> np.ndarray:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return allocate(kv, rows)

    return give


class CacheMachine(RuleBasedStateMachine):
    """A text that is continued, cut back and replaced; what the engine answers depends on the text alone."""

    text: list[int]  # the tokens in the cache and, if the last prompt was answered, the newest
    other: tuple[list[int], Cache]  # another conversation's
    answered: bool

    @initialize(max_seq_len=st.sampled_from([40, 300, 700]), row_multiple=st.sampled_from([1, 2, 4]))
    def load(self, max_seq_len: int, row_multiple: int) -> None:
        self.engine = fake_engine(max_seq_len, row_multiple)
        graphs: Any = self.engine.graphs
        self.target = graphs["target"]
        self.text, self.other, self.answered = [], ([], Cache(self.engine.manifest)), False

    # A list of tokens as a strategy is rarely long.
    @rule(kept=st.integers(0, 700) | KEPT_AT_A_MOVE, length=st.integers(1, 200), seed=st.integers(0, 99))
    def prompt(self, kept: int, length: int, seed: int) -> None:
        new = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
        prompt = [*self.text[:kept], *new][: self.engine.manifest.max_seq_len - 1]
        assert self.engine.cache.tokens == self.text[: self.engine.position]
        done = self.engine.prefill(prompt, Sampling(), self.engine.cache.reusable(prompt))
        assert done.tokens == continuation(prompt, 1)
        self.text, self.answered = [*prompt, *done.tokens], True

    @rule(
        kept=st.integers(0, 700) | KEPT_AT_A_MOVE,
        length=st.integers(1, 60),
        chunks=st.integers(0, 9),
        way=st.sampled_from(["stop", "Ctrl-C", "no memory"]),
    )
    def stopped_prompt(self, kept: int, length: int, chunks: int, way: str) -> None:
        """Between two chunks, in a pass that has written its rows, or where the cache has to grow."""
        cache, before = self.engine.cache, self.engine.cache.tokens[:]
        prompt = [*self.text[:kept], *[VOCAB - 1] * length][: self.engine.manifest.max_seq_len - 1]
        reused, asked = cache.reusable(prompt), []

        def go_on(done: int) -> bool:
            assert cache.tokens[:done] == prompt[:done]
            asked.append(done)
            self.target.interrupted = way == "Ctrl-C" and len(asked) > chunks
            return way != "stop" or len(asked) <= chunks

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt, MemoryError):
            if way == "no memory":
                patch.setattr("runtime_ref.cache.allocate", short_of_memory(chunks))
            done = self.engine.prefill(prompt, Sampling(), reused, go_on)
            assert done.tokens == ([] if way == "stop" and len(asked) > chunks else continuation(prompt, 1))
        self.target.interrupted = False
        assert cache.tokens == (before if way == "stop" and chunks == 0 else prompt[: asked[-1]])
        self.text, self.answered = cache.tokens[:], False

    @rule()
    def other_conversation(self) -> None:
        (self.text, self.engine.cache), self.other = self.other, (self.text[: self.engine.position], self.engine.cache)
        self.answered = False

    @precondition(lambda self: self.answered and len(self.text) < self.engine.manifest.max_seq_len)
    @rule(count=st.integers(0, MAX_DRAFTS), right=st.integers(0, MAX_DRAFTS))
    def round(self, count: int, right: int) -> None:
        count = min(count, self.engine.manifest.max_seq_len - len(self.text) - 1)
        right = min(right, count)
        expected = continuation(self.text, right + 1)
        drafts = self.engine.draft(self.text[-1], count)
        drafts[:right] = expected[:right]
        if right < count:
            drafts[right] = (expected[right] + 1) % VOCAB
        done = self.engine.verify(self.text[-1], drafts, Sampling())
        assert (done.accepted, done.tokens) == (right, expected)
        self.text += done.tokens


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("given", [0, 1])
def test_growing_happens_to_all_buffers_or_to_none(given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for so many of two larger buffers is there: what was in the cache goes on as if nothing had been tried."""
    engine, text = fake_engine(700), np.random.default_rng(0).integers(0, VOCAB, 254).tolist()
    engine.prefill(text, Sampling())
    buffers, start = engine.cache.buffers, engine.cache.window_start
    kept = {name: buffer.copy() for name, buffer in buffers.items()}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("runtime_ref.cache.allocate", short_of_memory(given))
        engine.prefill([*text, 1, 2, 3, 4], Sampling(), 254)
    assert engine.cache.buffers is buffers and engine.cache.window_start == start
    assert all(np.array_equal(buffers[name], kept[name]) for name in kept)
    assert engine.cache.tokens == text
    assert engine.prefill([*text, 1], Sampling(), 254).tokens == continuation([*text, 1], 1)
    assert engine.prefill([*text, 1, 2, 3, 4], Sampling(), 254).tokens == continuation([*text, 1, 2, 3, 4], 1)


def test_graphs_are_bound_again_after_ctrl_c_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target has another conversation's buffers by then, the drafter still those of the first, which goes on."""

    def interrupted(cache: Mapping[str, np.ndarray]) -> None:
        raise KeyboardInterrupt

    engine, text = fake_engine(700), np.random.default_rng(0).integers(0, VOCAB, 60).tolist()
    engine.prefill(text, Sampling())
    first, engine.cache = engine.cache, Cache(engine.manifest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.graphs["drafter"], "bind", interrupted)
        engine.prefill([1], Sampling())
    engine.cache = first
    assert engine.prefill([*text, 1], Sampling(), 60).tokens == continuation([*text, 1], 1)


@pytest.mark.parametrize("what", ["prompt", "round"])
def test_ctrl_c_at_any_line(what: str) -> None:
    """A pass that moves rows and grows buffers is interrupted at each line in turn; the next prompt goes on."""
    text = np.random.default_rng(0).integers(0, VOCAB, 252).tolist()
    longer = [*text, *continuation(text, 9)]
    lines, interrupted = 0, True
    while interrupted:
        engine, lines, interrupted = fake_engine(700), lines + 1, False
        newest = engine.prefill(text, Sampling()).tokens[0]
        with raises_at_line(lines):
            try:
                if what == "prompt":
                    engine.prefill(longer, Sampling(), len(text))
                else:
                    engine.verify(newest, longer[-8:-1], Sampling())
            except KeyboardInterrupt:
                interrupted = True
        tokens = engine.cache.tokens
        assert tokens == longer[: len(tokens)] and len(tokens) >= len(text)
        assert interrupted or len(tokens) > len(text)
        asked = [*tokens, 3]  # one row, which attends to rows that were moved
        assert engine.cache.reusable(asked) == len(tokens)
        assert engine.prefill(asked, Sampling(), len(tokens)).tokens == continuation(asked, 1)
    assert lines > 30
    assert engine.cache.window_start > 0 and engine.cache.buffers["full"].shape[1] > 256


@contextlib.contextmanager
def raises_at_line(number: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before a line, counted from the first that engine and cache run in the block."""
    left, before = number, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(("graph_engine.py", "runtime_ref/cache.py")):
            return None
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
