"""The decoding loop on a fake engine: whatever is drafted, the text is that of plain decoding."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_ref.acceptance import Round, accept
from runtime_ref.decoder import Options, generate
from runtime_ref.errors import InputError
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats


@dataclass
class ArithmeticEngine:
    """Each token is a hash of the text before it; a draft is right with probability `skill`."""

    skill: float
    max_seq_len: int = 64
    eos: frozenset[int] = frozenset({0})
    text: list[int] = field(default_factory=list)
    largest_position: int = 0

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(
            **{"max_seq_len": self.max_seq_len, "eos": self.eos, "vocab_size": 11, "max_draft_tokens": 8},
            **{"row_multiple": 1, "channels": {}},
        )

    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0, go_on: Any = None) -> Round:
        assert self.text[:start] == list(tokens[:start])
        self.text = list(tokens)
        return Round([], 0, [self._next(self.text)], [0.0])

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(num_draft_tokens):
            right = self._next([*self.text, last, *drafts])
            drafts.append(right if random.random() < self.skill else (right + 1) % 11)
        return drafts

    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        self.text.append(last)
        choices = [self._next([*self.text, *drafts[:i]]) for i in range(len(drafts) + 1)]
        accepted, tokens = accept(drafts, choices)
        self.largest_position = max(self.largest_position, len(self.text) + len(drafts))
        self.text += tokens[:-1]
        return Round(drafts, accepted, tokens, [0.0] * len(tokens))

    @staticmethod
    def _next(text: Sequence[int]) -> int:
        return hash((17, *text)) % 11


@given(
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=60),
    budget=st.integers(1, 80),
    drafts=st.integers(1, 8),
    skill=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_speculative_equals_plain(prompt: list[int], budget: int, drafts: int, skill: float, seed: int) -> None:
    random.seed(seed)
    plain_stats, stats = Stats(), Stats()
    plain = list(generate(ArithmeticEngine(0.0), prompt, Options(budget, 0), plain_stats))
    engine = ArithmeticEngine(skill)
    assert list(generate(engine, prompt, Options(budget, drafts), stats)) == plain
    assert stats.finish_reason == plain_stats.finish_reason
    assert stats.rounds <= plain_stats.rounds == len(plain) - 1
    # Every token after the first comes from a round: one of its accepted drafts, or its bonus token.
    ended_on_draft = stats.rounds + stats.accepted - (len(plain) - 1)
    assert ended_on_draft in ((0, 1) if stats.finish_reason == "eos" else (0,))
    assert engine.largest_position <= engine.max_seq_len
    assert sum(stats.accepted_by_position) == stats.accepted <= stats.drafted == sum(stats.drafted_by_position)


def test_finish_reasons() -> None:
    def finish(prompt: list[int], budget: int, eos: frozenset[int], room: int) -> tuple[str, int]:
        stats = Stats()
        tokens = list(generate(ArithmeticEngine(1.0, room, eos), prompt, Options(budget, 4), stats))
        return stats.finish_reason, len(tokens)

    assert finish([1, 2], 9, frozenset(), 64) == ("length", 9)
    assert finish([1, 2], 99, frozenset(), 20) == ("max_seq_len", 18)
    assert finish([1, 2], 99, frozenset(range(11)), 64) == ("eos", 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt is empty"), ([1] * 64, "has 64 tokens"), ([3, 11], "token id 11"), ([-1], "token id -1")],
)
def test_bad_prompts_are_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(generate(ArithmeticEngine(1.0), prompt, Options(), Stats()))
