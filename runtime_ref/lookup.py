"""Prompt lookup: draft tokens copied from where the newest tokens occurred before in the text.

Prompt lookup decoding (Saxena 2023). Such drafts take no time to make.
"""

from collections.abc import Iterable

MIN_MATCH_TOKENS = 2  # tokens that must match
MAX_MATCH_TOKENS = 16  # a longer match is no better sign


class Lookup:
    """A text, and where each run of `MIN_MATCH_TOKENS` tokens in it was last followed by a token."""

    def __init__(self) -> None:
        """Begin an empty text."""
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Append token ids to the text."""
        for token in tokens:
            # A run is entered once its follower is known, so the newest tokens never match themselves.
            self._after[tuple(self._text[-MIN_MATCH_TOKENS:])] = len(self._text)
            self._text.append(token)

    def find(self, max_tokens: int) -> tuple[int, list[int]]:
        """Copy what followed the newest tokens where they occurred last.

        A copy that reaches the end of the text goes on with its own beginning: a text that repeats itself is expected
        to continue so.

        Args:
            max_tokens: how many tokens to copy.

        Returns:
            How many of the newest tokens match, at most `MAX_MATCH_TOKENS`, and `max_tokens` token ids; 0 and an empty
            list if too few match.
        """
        start = self._after.get(tuple(self._text[-MIN_MATCH_TOKENS:])) if len(self._text) > MIN_MATCH_TOKENS else None
        if start is None:
            return 0, []
        matching, period = MIN_MATCH_TOKENS, len(self._text) - start
        longest = min(MAX_MATCH_TOKENS, start)
        while matching < longest and self._text[start - 1 - matching] == self._text[-1 - matching]:
            matching += 1
        return matching, [self._text[start + i % period] for i in range(max_tokens)]
