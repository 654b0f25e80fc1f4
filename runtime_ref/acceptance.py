"""Which drafts a verify pass accepts."""

from collections.abc import Sequence


def accept(drafts: Sequence[int], choices: Sequence[int]) -> tuple[int, list[int]]:
    """Longest prefix of drafts that equals the target's own choices, then the bonus token.

    Args:
        drafts: K draft tokens.
        choices: the target's K+1 choices: after `last`, after the first draft, and so on.

    Returns:
        How many drafts were accepted, and the tokens that the round adds: the accepted drafts and one more.
    """
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return accepted, list(choices[: accepted + 1])
