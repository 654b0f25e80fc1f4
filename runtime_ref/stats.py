"""Counts and times of a generation."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from runtime_ref.acceptance import Round


@dataclass
class SourceStats:
    """Counts of the rounds whose drafts came from one source.

    Attributes:
        rounds: rounds with drafts of this source.
        drafted: draft tokens that it proposed.
        accepted: how many of them were accepted.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Stats:
    """Counts and times of one generation.

    Only tokens that were given out count: drafts after them, for instance after an end token or a stop string, count as
    drafted, not as accepted.

    Attributes:
        rounds: rounds, without the prefill.
        tokens: tokens that the rounds gave out.
        drafted: draft tokens of all rounds.
        accepted: how many of them were accepted.
        drafted_by_position: draft tokens by their position in the round.
        accepted_by_position: accepted drafts by their position in the round.
        drafted_lengths: rounds by their number of drafts.
        sources: counts by the source of drafts, of rounds that had drafts.
        reused_tokens: tokens of the prompt that were in the cache already.
        dropped_tokens: tokens of prompt and answer that were left out because the context was full.
        prefill_seconds: time of the prefill, and of what was run again because the context was full.
        decode_seconds: time of all rounds.
        finish_reason: `eos`, `length`, `max_seq_len`, `stop` or `cancelled`; empty while text is generated.
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    drafted_lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, SourceStats] = field(default_factory=dict)
    reused_tokens: int = 0
    dropped_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = ""
    _newest: tuple[Round, SourceStats] | None = None  # as far as it is counted

    def begin(self, reused_tokens: int) -> None:
        """Begin a text, so many of whose prompt's tokens are in the cache already."""
        self.reused_tokens, self.finish_reason, self._newest = reused_tokens, "", None

    def shift(self, dropped_tokens: int) -> None:
        """Go on after a prefill, with so many tokens left out in all."""
        self.dropped_tokens, self._newest = dropped_tokens, None

    def add(self, done: Round, source: str) -> None:
        """Add a round.

        Args:
            done: the round, cut off where the text ends.
            source: where its drafts came from.
        """
        drafted, counts = len(done.drafts), SourceStats()
        self.rounds += 1
        self.drafted += drafted
        self.drafted_lengths[drafted] += 1
        for by_position in (self.drafted_by_position, self.accepted_by_position):
            by_position.extend([0] * (drafted - len(by_position)))
        for i in range(drafted):
            self.drafted_by_position[i] += 1
        if drafted:
            counts = self.sources.setdefault(source, counts)
            counts.rounds += 1
            counts.drafted += drafted
        self._newest = done.cut(0), counts
        self.count(done)

    def count(self, done: Round) -> None:
        """Count the newest round as another cut of it, in place of the one that was counted.

        Args:
            done: the newest round, cut off after the tokens that were given out.
        """
        if self._newest is None:  # the prefill is no round
            return
        before, counts = self._newest
        self.tokens += len(done.tokens) - len(before.tokens)
        self.accepted += done.accepted - before.accepted
        counts.accepted += done.accepted - before.accepted
        for i in range(len(done.drafts)):
            self.accepted_by_position[i] += (i < done.accepted) - (i < before.accepted)
        self._newest = done, counts

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts / proposed drafts; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_tokens_per_round(self) -> float | None:
        """Tokens that the rounds gave out / rounds; None without a round.

        That is 1 + accepted / rounds, less the bonus token of a round that the end of the text cuts off.
        """
        return self.tokens / self.rounds if self.rounds else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Acceptance rate of the drafts at each position of a round."""
        return [a / d for a, d in zip(self.accepted_by_position, self.drafted_by_position, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of `generate --json`."""
        return {
            "finish_reason": self.finish_reason,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_by_position": self.acceptance_by_position,
            "mean_tokens_per_round": self.mean_tokens_per_round,
            "rounds_by_num_draft_tokens": {str(drafts): n for drafts, n in sorted(self.drafted_lengths.items())},
            "drafts_by_source": {source: vars(counts) for source, counts in self.sources.items()},
            "reused_prompt_tokens": self.reused_tokens,
            "dropped_tokens": self.dropped_tokens,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }
