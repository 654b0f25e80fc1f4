"""Graphs that hash what they see: an engine whose tokens are known, and wrong if any row of its cache is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtime_ref.cache import CACHE_STEP_ROWS
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import SLIDE_ROWS, KVBuffer, round_up, window_rows
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import Decoder

VOCAB, WINDOW, PASS_TOKENS, MAX_DRAFTS = 17, 5, 8, 7
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

    interrupted = False

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self.cache = cache

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        position, start = int(inputs["position"][0]), int(inputs["window_start"][0])
        assert start % SLIDE_ROWS == 0
        end = position + len(inputs["embedded"])
        for name, first in (("full", 0), ("sliding", start)):
            assert 0 <= position - first < end - first <= self.cache[name].shape[1]
            self.cache[name][0, position - first : end - first] = inputs["embedded"] - 9 * self.interrupted
        if self.interrupted:
            raise KeyboardInterrupt
        texts = [seen(self.cache, position + int(row), start, WINDOW) for row in inputs["output_rows"]]
        chosen = [fingerprint(text) % VOCAB for text in texts]
        logits = np.tile(np.array([3, 1], np.float32), (len(texts), 1))
        states = np.array([[fingerprint(text)] for text in texts], np.float32)
        return [logits, np.array([[token, (token + 1) % VOCAB] for token in chosen]), states]


class FakeDrafter:
    """Two of three drafts are right. It expects the target's state of the last row that it sees, later its own."""

    def __init__(self) -> None:
        self.text: list[int] = []  # up to the draft before, in the later steps of a round

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self.cache = cache

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        text = seen(self.cache, int(inputs["position"][0]) - 1, int(inputs["window_start"][0]), WINDOW + 1)
        later = inputs["state"] == LATER_STEP
        assert later or inputs["state"] == fingerprint(text)
        self.text = [*(self.text if later else text), int(inputs["embedded"][0, 0])]
        wrong = len(self.text) % 3 == 0
        return [np.array([(fingerprint(self.text) + wrong) % VOCAB]), np.full((1, 1), LATER_STEP)]


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


def fake_engine(max_seq_len: int, row_multiple: int = 1) -> GraphEngine:
    cache_rows = round_up(max_seq_len + 3, CACHE_STEP_ROWS)
    limits = {"num_tokens": PASS_TOKENS, "num_outputs": MAX_DRAFTS + 1, "cache_rows": cache_rows}
    limits["window_rows"] = min(cache_rows, window_rows(WINDOW, PASS_TOKENS))
    kv = KVBuffer("full", 0, "full_attention", 1, 1), KVBuffer("sliding", 1, "sliding_attention", 1, 1)
    manifest: Any = SimpleNamespace(
        max_seq_len=max_seq_len,
        max_draft_tokens=MAX_DRAFTS,
        vocab_size=VOCAB,
        hidden_size=1,
        sliding_window=WINDOW,
        row_multiple=row_multiple,
        limits=limits,
        kv=kv,
        sampling=Sampling(),
        repetition_penalty=1.0,
        eos=frozenset(),
        channels={},
        digest="0" * 64,
    )
    tables = {"embed_tokens": Rows(), "embed_tokens_per_layer": Rows()}
    return GraphEngine(manifest, {"target": FakeTarget(), "drafter": FakeDrafter()}, tables)


def fake_decoder(max_seq_len: int = 1000) -> Decoder:
    """A decoder whose texts are `continuation` of their prompts."""
    return Decoder(Path("b"), fake_engine(max_seq_len), None, DraftLength(MAX_DRAFTS, Costs(MAX_DRAFTS)))
