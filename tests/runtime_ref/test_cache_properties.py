"""The engine's cache against a list: prompts, rounds and rollbacks in any order, on graphs that hash what they see."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from runtime_ref.acceptance import common_prefix
from runtime_ref.graph_engine import CACHE_STEP_ROWS, GraphEngine
from runtime_ref.manifest import SLIDE_ROWS, KVBuffer, round_up, window_rows
from runtime_ref.sampling import Sampling

VOCAB, WINDOW, PASS_TOKENS, MAX_DRAFTS = 17, 5, 8, 7
# Tokens after which the sliding buffer may begin a step later than before.
KEPT_AT_A_MOVE = st.sampled_from([SLIDE_ROWS * steps + WINDOW + more for steps in (1, 2, 3) for more in range(-3, 4)])
LATER_STEP = -1.0  # the fake drafter's state after its first step


def fingerprint(text: Sequence[int]) -> int:
    value = 7
    for token in text:
        value = (value * 31 + token + 1) % 1_000_003
    return value


def continuation(text: Sequence[int], count: int) -> list[int]:
    """The tokens that plain decoding gives after a text."""
    whole = list(text)
    for _ in range(count):
        whole.append(fingerprint(whole) % VOCAB)
    return whole[len(text) :]


class FakeTarget:
    """Its next token is a hash of every row that a full layer sees; its state as well."""

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self.cache = cache

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        position, start = int(inputs["position"][0]), int(inputs["window_start"][0])
        assert start % SLIDE_ROWS == 0
        end = position + len(inputs["embedded"])
        for name, first in (("full", 0), ("sliding", start)):
            assert 0 <= position - first < end - first <= self.cache[name].shape[1]
            self.cache[name][0, position - first : end - first] = inputs["embedded"]
        texts = [seen(self.cache, position + int(row), start, WINDOW) for row in inputs["output_rows"]]
        chosen = [fingerprint(text) % VOCAB for text in texts]
        logits = np.tile(np.array([3, 1], np.float32), (len(texts), 1))
        states = np.array([[fingerprint(text)] for text in texts], np.float32)
        return [logits, np.array([[token, (token + 1) % VOCAB] for token in chosen]), states]


class FakeDrafter:
    """It always drafts 0, and expects the target's state of the last row that it sees, later the state that it gave."""

    first_step = True

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self.cache = cache

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        text = seen(self.cache, int(inputs["position"][0]) - 1, int(inputs["window_start"][0]), WINDOW + 1)
        assert inputs["state"] == (fingerprint(text) if self.first_step else LATER_STEP)
        self.first_step = False
        return [np.array([0]), np.full((1, 1), LATER_STEP)]


def seen(cache: Mapping[str, np.ndarray], last: int, start: int, window: int) -> list[int]:
    """The text that a full layer sees up to a position; a sliding layer sees the end of the same text."""
    first = max(0, last - window + 1)
    assert first >= start
    full, sliding = cache["full"][0, : last + 1, 0], cache["sliding"][0, first - start : last + 1 - start, 0]
    assert np.array_equal(full[first:], sliding)
    return full.astype(int).tolist()


class Rows:
    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        return np.array(ids, np.float32)[:, None]


class CacheMachine(RuleBasedStateMachine):
    """A text that is continued, cut back and replaced; what the engine answers depends on the text alone."""

    text: list[int]

    @initialize(max_seq_len=st.sampled_from([40, 300, 700]), row_multiple=st.sampled_from([1, 2, 4]))
    def load(self, max_seq_len: int, row_multiple: int) -> None:
        cache_rows = round_up(max_seq_len + 3, CACHE_STEP_ROWS)
        limits = {"num_tokens": PASS_TOKENS, "num_outputs": MAX_DRAFTS + 1, "cache_rows": cache_rows}
        limits["window_rows"] = min(cache_rows, window_rows(WINDOW, PASS_TOKENS))
        kv = KVBuffer("full", 0, "full_attention", 1, 1), KVBuffer("sliding", 1, "sliding_attention", 1, 1)
        manifest: Any = SimpleNamespace(
            max_seq_len=max_seq_len,
            hidden_size=1,
            sliding_window=WINDOW,
            row_multiple=row_multiple,
            limits=limits,
            kv=kv,
        )
        self.drafter = FakeDrafter()
        tables = {"embed_tokens": Rows(), "embed_tokens_per_layer": Rows()}
        self.engine = GraphEngine(manifest, {"target": FakeTarget(), "drafter": self.drafter}, tables)
        self.text = []

    # A list of tokens as a strategy is rarely long.
    @rule(kept=st.integers(0, 700) | KEPT_AT_A_MOVE, length=st.integers(1, 200), seed=st.integers(0, 99))
    def prompt(self, kept: int, length: int, seed: int) -> None:
        new = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
        prompt = [*self.text[:kept], *new][: self.engine.manifest.max_seq_len - 1]
        shared = common_prefix(self.text[: self.engine.position], prompt[:-1])
        done = self.engine.prefill(prompt, Sampling(), shared if self.engine.can_resume(shared) else 0)
        assert done.tokens == continuation(prompt, 1)
        self.text = [*prompt, *done.tokens]

    @precondition(lambda self: 0 < len(self.text) < self.engine.manifest.max_seq_len)
    @rule(count=st.integers(0, MAX_DRAFTS), right=st.integers(0, MAX_DRAFTS))
    def round(self, count: int, right: int) -> None:
        count = min(count, self.engine.manifest.max_seq_len - len(self.text) - 1)
        right = min(right, count)
        expected = continuation(self.text, right + 1)
        self.drafter.first_step = True
        drafts = self.engine.draft(self.text[-1], count)
        drafts[:right] = expected[:right]
        if right < count:
            drafts[right] = (expected[right] + 1) % VOCAB
        done = self.engine.verify(self.text[-1], drafts, Sampling())
        assert (done.accepted, done.tokens) == (right, expected)
        self.text += done.tokens


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
