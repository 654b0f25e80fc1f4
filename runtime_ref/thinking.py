"""How long a model may think: a number of tokens, after which the thought is ended."""

import copy
from collections.abc import Sequence

from runtime_ref.text_parts import THOUGHT, PartTracker


class ThoughtLimit:
    """Counts a text's tokens in thoughts, ends a thought that has as many as it may, and allows none after it."""

    def __init__(self, tracker: PartTracker, marks: tuple[int, int], max_tokens: int) -> None:
        """Begin a text.

        Args:
            tracker: of this limit alone, before the text's first token.
            marks: ids of the tokens that begin and end a thought.
            max_tokens: of all thoughts of the text together, without their marks.
        """
        self._tracker, self._left = tracker, max_tokens
        self._begin, self._end = marks

    @property
    def forced(self) -> int | None:
        """The token that must come next: the end of a thought that has as many tokens as it may; None for any."""
        return self._end if self._tracker.channel == THOUGHT and self._left <= 0 else None

    @property
    def forbidden(self) -> int | None:
        """The token that must not come next: the beginning of a thought that may have no token; None for none."""
        return self._begin if self._tracker.channel is None and self._left <= 0 else None

    def commit(self, token: int) -> None:
        """Go on by a token.

        Args:
            token: id of the text's next token.
        """
        part, is_mark = self._tracker.add(token)
        self._left -= part == THOUGHT and not is_mark

    def num_allowed(self, drafts: Sequence[int]) -> int:
        """Return how many of the drafts may come next, in their order.

        Args:
            drafts: token ids.
        """
        ahead = copy.copy(self)
        ahead._tracker = copy.copy(self._tracker)
        for i, token in enumerate(drafts):
            if ahead.forced not in (None, token) or ahead.forbidden == token:
                return i
            ahead.commit(token)
        return len(drafts)
