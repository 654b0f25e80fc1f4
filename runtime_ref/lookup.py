"""Draft tokens that cost nothing: what followed the newest tokens where they stood before.

Prompt lookup decoding (Saxena 2023).
"""

from collections.abc import Iterable

SHORTEST = 2  # tokens that must agree
LONGEST = 16  # agreement beyond this says no more


class Lookup:
    """A text, and where each run of `SHORTEST` tokens in it was last followed by something."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            # Only now is it known what follows: so the newest tokens never find themselves.
            self._after[tuple(self._text[-SHORTEST:])] = len(self._text)
            self._text.append(token)

    def find(self, most: int) -> tuple[int, list[int]]:
        """How many of the newest tokens stood together before, and what followed them there, up to `most` tokens.

        Where what followed reaches the end of the text, it goes round: a text that repeats itself goes on doing so.
        """
        start = self._after.get(tuple(self._text[-SHORTEST:])) if len(self._text) > SHORTEST else None
        if start is None:
            return 0, []
        agreeing, period = SHORTEST, len(self._text) - start
        while agreeing < min(LONGEST, start) and self._text[start - 1 - agreeing] == self._text[-1 - agreeing]:
            agreeing += 1
        return agreeing, [self._text[start + i % period] for i in range(most)]
