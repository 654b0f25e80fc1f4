"""What a generation did, counted."""

from dataclasses import dataclass, field
from typing import Any

from runtime_ref.acceptance import Round


@dataclass
class Stats:
    """Counts of one generation. Drafts after an end token or past the budget count as drafted, not as accepted."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = "length"

    def add(self, done: Round, emitted: int) -> None:
        """Count a round of which `emitted` tokens were kept."""
        accepted = min(done.accepted, emitted)
        self.rounds += 1
        self.drafted += len(done.drafts)
        self.accepted += accepted
        for counts, upto in ((self.drafted_by_position, len(done.drafts)), (self.accepted_by_position, accepted)):
            counts.extend([0] * (len(done.drafts) - len(counts)))
            for i in range(upto):
                counts[i] += 1

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
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }
