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

    Drafts after an end token or past the budget count as drafted, not as accepted.

    Attributes:
        rounds: rounds, without the prefill.
        drafted: draft tokens of all rounds.
        accepted: how many of them were accepted.
        drafted_by_position: draft tokens by their position in the round.
        accepted_by_position: accepted drafts by their position in the round.
        drafted_lengths: rounds by their number of drafts.
        sources: counts by the source of drafts, of rounds that had drafts.
        reused_tokens: tokens of the prompt that were in the cache already.
        prefill_seconds: time of the prefill.
        decode_seconds: time of all rounds.
        finish_reason: `eos`, `length`, `max_seq_len`, `stop` or `cancelled`; empty while text is generated.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    drafted_lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, SourceStats] = field(default_factory=dict)
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = ""

    def add(self, done: Round, source: str) -> None:
        """Add a round.

        Args:
            done: the round, cut off where the text ends.
            source: where its drafts came from.
        """
        drafted = len(done.drafts)
        self.rounds += 1
        self.drafted += drafted
        self.accepted += done.accepted
        self.drafted_lengths[drafted] += 1
        for counts, upto in ((self.drafted_by_position, drafted), (self.accepted_by_position, done.accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for i in range(upto):
                counts[i] += 1
        if drafted:
            of_source = self.sources.setdefault(source, SourceStats())
            of_source.rounds += 1
            of_source.drafted += drafted
            of_source.accepted += done.accepted

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts / proposed drafts; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_tokens_per_round(self) -> float | None:
        """1 + accepted / rounds; None without a round."""
        return 1 + self.accepted / self.rounds if self.rounds else None

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
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }
