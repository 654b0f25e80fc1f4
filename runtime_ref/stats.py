"""What a generation did, counted."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from runtime_ref.acceptance import Round


@dataclass
class Sourced:
    """Rounds whose drafts came from one source."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Stats:
    """Counts of one generation. Drafts after an end token or past the budget count as drafted, not as accepted.

    `drafted_lengths` counts rounds by their number of drafts, `sources` by who made the drafts, if there were any.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    drafted_lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, Sourced] = field(default_factory=dict)
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = ""

    def add(self, done: Round, source: str) -> None:
        """Count a round."""
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
            of_source = self.sources.setdefault(source, Sourced())
            of_source.rounds += 1
            of_source.drafted += drafted
            of_source.accepted += done.accepted

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted drafts over proposed drafts, None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_tokens_per_round(self) -> float | None:
        """1 + accepted / rounds, None without a round."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts proposed at each position of a round that were accepted."""
        return [a / d for a, d in zip(self.accepted_by_position, self.drafted_by_position, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """The fields of `generate --json`."""
        return {
            "finish_reason": self.finish_reason,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_by_position": self.acceptance_by_position,
            "mean_tokens_per_round": self.mean_tokens_per_round,
            "rounds_by_num_draft_tokens": {str(drafts): n for drafts, n in sorted(self.drafted_lengths.items())},
            "drafts_by_source": {source: vars(found) for source, found in self.sources.items()},
            "reused_prompt_tokens": self.reused_tokens,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }
