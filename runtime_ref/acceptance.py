"""Which drafts a verify pass accepts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Round:
    """What one round did: the drafts proposed, how many were accepted, and the tokens it adds to the text.

    `logprobs` are those tokens' log-probabilities, as `sampling.log_probabilities` defines them.
    """

    drafts: Sequence[int]
    accepted: int
    tokens: list[int]
    logprobs: list[float]

    def cut(self, count: int) -> "Round":
        """The same round with only its first tokens; an accepted draft that is cut off counts as not accepted."""
        return replace(
            self, accepted=min(self.accepted, count), tokens=self.tokens[:count], logprobs=self.logprobs[:count]
        )


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the longest common prefix of two sequences.

    Args:
        one: tokens or characters, of any length.
        other: the sequence it is compared with, of any length.

    Returns:
        The index of the first difference; the shorter length if one sequence continues the other.
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def accept(drafts: Sequence[int], choices: Sequence[int]) -> tuple[int, list[int]]:
    """Longest prefix of drafts that equals the target's own choices, then the bonus token.

    Args:
        drafts: K draft tokens.
        choices: the target's K+1 choices: after `last`, after the first draft, and so on.

    Returns:
        How many drafts were accepted, and the tokens that the round adds: the accepted drafts and one more.
    """
    accepted = common_prefix(drafts, choices)
    return accepted, list(choices[: accepted + 1])
