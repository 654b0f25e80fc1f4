"""Speed-up of speculative decoding: computed from the costs of passes, and measured at a forced acceptance rate."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from exporter.bench.timing import turns
from runtime_ref.acceptance import Round
from runtime_ref.decoder import Options, generate
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import round_up
from runtime_ref.sampling import Chooser
from runtime_ref.stats import Stats

MIN_TURNS, MAX_TURNS = 3, 12


def expected_tokens(drafts: int, acceptance: float) -> float:
    """Compute the mean number of tokens that a round adds.

    It is the sum of a^i for i from 0 to K: the round adds token i + 1 if its first i drafts are accepted, and always
    adds the first token.

    Args:
        drafts: draft tokens of the round, K.
        acceptance: probability a that a draft is accepted if all drafts before it were.
    """
    return float(sum(acceptance**i for i in range(drafts + 1)))


def verify_cost(costs: Mapping[int, float], tokens: int) -> float:
    """Return the cost of a pass over `tokens` tokens, interpolated linearly between the costs that were measured.

    Args:
        costs: costs by number of tokens, relative to a pass over one token.
        tokens: tokens of the pass.
    """
    measured = sorted(costs)
    return float(np.interp(tokens, measured, [costs[t] for t in measured]))


def speedups(
    costs: Mapping[int, float], draft_cost: float, acceptance: float, max_drafts: int, row_multiple: int = 1
) -> list[float]:
    """Compute how many times faster than plain decoding rounds of 1 to `max_drafts` drafts are.

    Args:
        costs: costs of passes by number of tokens, relative to a pass over one token.
        draft_cost: cost of a draft step, relative to a pass over one token.
        acceptance: probability that a draft is accepted if all drafts before it were.
        max_drafts: drafts of the longest round.
        row_multiple: passes are padded to a multiple of this many tokens.
    """
    tokens = [expected_tokens(k, acceptance) for k in range(1, max_drafts + 1)]
    return speedups_from_tokens(costs, draft_cost, tokens, row_multiple)


def speedups_from_tokens(
    costs: Mapping[int, float], draft_cost: float, tokens: Sequence[float], row_multiple: int = 1
) -> list[float]:
    """Compute how many times faster than plain decoding rounds of 1, 2, ... drafts are.

    Args:
        costs: costs of passes by number of tokens, relative to a pass over one token.
        draft_cost: cost of a draft step, relative to a pass over one token.
        tokens: mean tokens that a round of 1, 2, ... drafts adds.
        row_multiple: passes are padded to a multiple of this many tokens.
    """
    padded = [round_up(k + 1, row_multiple) for k in range(1, len(tokens) + 1)]
    return [
        added / (verify_cost(costs, rows) + k * draft_cost)
        for k, (added, rows) in enumerate(zip(tokens, padded, strict=True), start=1)
    ]


class ForcedEngine(GraphEngine):
    """Replaces its drafts by tokens that are known to be right or wrong, after really drafting.

    So the acceptance rate is a chosen one for any weights, while the work is that of real drafting. A prompt whose rows
    are still in the cache is not run again.

    Attributes:
        answer: tokens of plain decoding after the prompt.
        acceptance: probability that a draft is right if all drafts before it in the round are.
        generator: draws which drafts are right.
        scheduled: drafts made so far that are right, and so must be accepted.
    """

    answer: Sequence[int] = ()
    acceptance = 0.0
    generator = random.Random(0)
    scheduled = 0
    _start: tuple[list[int], int, Round, np.ndarray] | None = None

    def prefill(
        self, tokens: Sequence[int], sampling: Chooser, start: int = 0, go_on: Callable[[int], bool] = lambda _: True
    ) -> Round:
        """Return to the end of the prompt if the last prefill was of the same tokens and its rows are still there.

        Args:
            tokens: token ids of the prompt.
            sampling: chooses the first token.
            start: how many tokens of the prompt are in the cache already.
            go_on: called if the prompt is run, as by `Engine.prefill`.

        Returns:
            The round that adds the first token after the prompt.
        """
        if self._start is not None and self._start[:2] == (list(tokens), self.cache.window_start):
            self.cache.roll_back(len(tokens))
            self.cache.state = self._start[3]
            return self._start[2]
        first = super().prefill(tokens, sampling, start, go_on)
        if first.tokens:  # it was not stopped
            self._start = (list(tokens), self.cache.window_start, first, self.cache.state)
        return first

    def forget(self) -> None:
        """Make the next prefill run its prompt, even if its rows are in the cache."""
        self._start = None

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Draft, then return forced drafts instead; there are fewer where `answer` ends.

        Args:
            last: token id after which drafts are made.
            num_draft_tokens: how many drafts are made.
        """
        super().draft(last, num_draft_tokens)
        assert self._start is not None
        at = self.position + 1 - len(self._start[0])
        drafts, right = [], True
        for token in self.answer[at : at + num_draft_tokens]:
            right = right and self.generator.random() < self.acceptance
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
    """Time plain decoding and rounds of each number of drafts, in turns, with newly drawn acceptances in each turn.

    Rates are of decoding alone, without the prefill. `times_faster` compares the seconds of all turns together: the
    fastest turn may only have drawn more accepted drafts than the others.

    Args:
        engine: an engine of the bundle.
        prompt: token ids.
        new_tokens: tokens of each continuation.
        acceptance: probability that a draft is accepted if all drafts before it were.
        drafts: numbers of drafts per round to measure.
        seconds: time budget in seconds for each of them and for plain decoding; there are at least three turns.

    Returns:
        The keys of `generation` in the document of `bench --json`, except `context` and `expected_times_faster`.
    """
    runs: dict[int, list[Stats]] = {k: [] for k in (0, *drafts)}
    equal, engine.scheduled, engine.acceptance = True, 0, acceptance
    for turn in turns(seconds * len(runs), MIN_TURNS, MAX_TURNS):
        for k, run in runs.items():
            stats = Stats()
            engine.generator = random.Random(1000 * turn + k)
            tokens = list(generate(engine, prompt, Options(new_tokens, k), stats))
            if k == 0 and turn == 0:
                engine.answer = tokens
            equal = equal and tokens == engine.answer
            run.append(stats)
    plain_seconds = sum(stats.decode_seconds for stats in runs[0])
    speculative = []
    for k in drafts:
        rounds, accepted = sum(s.rounds for s in runs[k]), sum(s.accepted for s in runs[k])
        speculative.append(
            {
                "num_draft_tokens": k,
                **_rates(runs[k], new_tokens),
                "tokens_per_round": 1 + accepted / rounds,
                "expected_tokens_per_round": expected_tokens(k, acceptance),
                "times_faster": plain_seconds / sum(stats.decode_seconds for stats in runs[k]),
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
