"""Which drafts a verify pass accepts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Round:
    """The outcome of one round, or of the prefill, which is a round without drafts.

    Attributes:
        drafts: the K draft tokens that were proposed.
        accepted: how many of them were accepted, 0 to K.
        tokens: token ids that the round adds to the text: the accepted drafts and the bonus token.
        logprobs: log-probabilities of `tokens`, as `sampling.log_probabilities` defines them.
    """

    drafts: Sequence[int]
    accepted: int
    tokens: list[int]
    logprobs: list[float]

    def cut(self, count: int) -> "Round":
        """Return the round with only its first tokens; an accepted draft that is cut off counts as not accepted.

        Args:
            count: tokens to keep.
        """
        return replace(
            self, accepted=min(self.accepted, count), tokens=self.tokens[:count], logprobs=self.logprobs[:count]
        )


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the longest common prefix of two sequences.

    Args:
        one: tokens or characters, of any length.
        other: the sequence it is compared with, of any length.

    Returns:
        The index of the first difference; the shorter length if one sequence continues the other.
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def accept(drafts: Sequence[int], choices: Iterable[int]) -> tuple[int, list[int]]:
    """Accept the longest prefix of the drafts that equals the target's own choices, and add the bonus token.

    Unlike the rejection sampling of Leviathan et al. (2023), which weighs probabilities, this compares tokens. Noise
    belongs to the position (`sampling.uniform`), so the text is that of plain decoding token for token, sampled or
    greedy.

    Args:
        drafts: K draft tokens.
        choices: the target's K+1 choices: after the last token of the text, after the first draft, and so on. None is
            taken after the first that is no draft, so what chooses them sees the tokens of the text and no others.

    Returns:
        How many drafts were accepted, and the tokens that the round adds: the accepted drafts and one more.
    """
    tokens: list[int] = []
    for choice in choices:
        tokens.append(choice)
        if len(tokens) > len(drafts) or drafts[len(tokens) - 1] != choice:
            break
    return len(tokens) - 1, tokens
