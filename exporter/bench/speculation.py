"""What drafting gains: computed from what passes cost, and measured with acceptance forced to a schedule."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporter.bench.timing import turns
from runtime_ref.acceptance import Round
from runtime_ref.decoder import Options, generate
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import round_up
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

TURNS = (3, 12)  # least and most


def expected_tokens(drafts: int, acceptance: float) -> float:
    """Tokens that a round adds on average, if a draft after accepted ones is accepted with this chance.

    The sum of a^i up to a^K: token i + 1 is there if i drafts before it were accepted, and the first one always is.
    """
    return float(sum(acceptance**i for i in range(drafts + 1)))


def verify_cost(costs: Mapping[int, float], tokens: int) -> float:
    """Cost of a pass of so many tokens, relative to one, on the line between those that were measured."""
    measured = sorted(costs)
    return float(np.interp(tokens, measured, [costs[t] for t in measured]))


def speedups(
    costs: Mapping[int, float], draft: float, acceptance: float, most: int, row_multiple: int = 1
) -> list[float]:
    """How many times faster than plain decoding rounds of 1 to `most` drafts are.

    Args:
        costs: of a pass of T tokens, relative to one.
        draft: cost of a draft step, relative to a pass of one token.
        row_multiple: what passes are filled up to.
    """
    return gains(costs, draft, [expected_tokens(k, acceptance) for k in range(1, most + 1)], row_multiple)


def gains(costs: Mapping[int, float], draft: float, tokens: Sequence[float], row_multiple: int = 1) -> list[float]:
    """The same where it is known how many tokens a round of 1, 2, .. drafts adds on average."""
    filled = [round_up(k + 1, row_multiple) for k in range(1, len(tokens) + 1)]
    return [
        added / (verify_cost(costs, rows) + k * draft)
        for k, (added, rows) in enumerate(zip(tokens, filled, strict=True), start=1)
    ]


class ForcedEngine(GraphEngine):
    """Really drafts, then puts tokens in the place of the drafts that are known to be right or wrong.

    So the pattern of acceptance is a given one on any weights, and the work is that of real drafting. A prompt that is
    in the cache already is not run again.
    """

    answer: Sequence[int] = ()  # what plain decoding says after the prompt
    acceptance = 0.0
    chance = random.Random(0)
    scheduled = 0  # accepted drafts that were asked for
    _start: tuple[list[int], int, Round, np.ndarray] | None = None

    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0) -> Round:
        """Start from the rows of the last prefill if they are this prompt's and all there still."""
        if self._start is not None and self._start[:2] == (list(tokens), self.window_start):
            self.position, self._state = len(tokens), self._start[3]
            return self._start[2]
        first = super().prefill(tokens, sampling, start)
        self._start = (list(tokens), self.window_start, first, self._state)
        return first

    def forget(self) -> None:
        """Run the next prompt whatever is in the cache."""
        self._start = None

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        super().draft(last, num_draft_tokens)
        assert self._start is not None
        at = self.position + 1 - len(self._start[0])
        drafts, right = [], True
        for token in self.answer[at : at + num_draft_tokens]:
            right = right and self.chance.random() < self.acceptance
            self.scheduled += right
            drafts.append(token if right else (token + 1) % self.manifest.vocab_size)
        return drafts


def forced_generation(
    engine: ForcedEngine,
    prompt: Sequence[int],
    new_tokens: int,
    acceptance: float,
    drafts: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """Plain decoding and rounds of each number of drafts, in turns, each turn with chances of its own.

    Turns end when `seconds` for each of these have passed, but there are three at least. Rates are of decoding, without
    the prefill. `times_faster` is of the seconds of all turns: the fastest one may just have had luck with its drafts.
    """
    runs: dict[int, list[Stats]] = {k: [] for k in (0, *drafts)}
    equal, engine.scheduled, engine.acceptance = True, 0, acceptance
    for turn in turns(seconds * len(runs), *TURNS):
        for k, done in runs.items():
            stats = Stats()
            engine.chance = random.Random(1000 * turn + k)
            tokens = list(generate(engine, prompt, Options(new_tokens, k), stats))
            if k == 0 and turn == 0:
                engine.answer = tokens
            equal = equal and tokens == engine.answer
            done.append(stats)
    plain = sum(stats.decode_seconds for stats in runs[0])
    speculative = []
    for k in drafts:
        rounds, accepted = sum(s.rounds for s in runs[k]), sum(s.accepted for s in runs[k])
        speculative.append(
            {
                "num_draft_tokens": k,
                **_rates(runs[k], new_tokens),
                "tokens_per_round": 1 + accepted / rounds,
                "expected_tokens_per_round": expected_tokens(k, acceptance),
                "times_faster": plain / sum(stats.decode_seconds for stats in runs[k]),
            }
        )
    return {
        "new_tokens": new_tokens,
        "turns": len(runs[0]),
        "acceptance": acceptance,
        "same_tokens": equal,
        "plain": _rates(runs[0], new_tokens),
        "speculative": speculative,
    }


def _rates(runs: Sequence[Stats], new_tokens: int) -> dict[str, Any]:
    rates = [(new_tokens - 1) / stats.decode_seconds for stats in runs]  # the first token is the prefill's
    return {"tokens_per_second": {"median": float(np.median(rates)), "max": max(rates), "count": len(rates)}}
