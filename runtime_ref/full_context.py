"""A full context: generation stops, or the oldest text is left out and the rest is run again."""

import bisect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from runtime_ref.errors import InputError

if TYPE_CHECKING:  # it imports Jinja
    from runtime_ref.chat import Message

STOP, SHIFT = "stop", "shift"
WHEN_FULL = (STOP, SHIFT)

Shift = Callable[[Sequence[int]], list[int] | None]  # called with the new tokens so far, returns those that stay


class TextShift:
    """What stays of a text: the beginning-of-text token, and the newest tokens, up to half of the context.

    Attributes:
        dropped_messages: 0, there are none.
    """

    dropped_messages = 0

    def __init__(self, prompt: Sequence[int], max_seq_len: int) -> None:
        """Begin with everything.

        Args:
            prompt: token ids, the first of them the beginning-of-text token.
            max_seq_len: tokens of prompt and answer together.
        """
        self._prompt, self._half = prompt, max_seq_len // 2

    def shift(self, answer: Sequence[int]) -> list[int] | None:
        """Return the tokens that stay, of a text that fills the context; None if a context has too few.

        Args:
            answer: the new tokens so far.
        """
        text = [*self._prompt, *answer]
        return [text[0], *text[1 - self._half :]] if self._half > 1 else None


class ChatShift:
    """What stays of a chat: its system prompt and the newest turns.

    A turn is a message of the user and all up to the next one, calls of tools and their answers among them; the newest
    turn always stays. As few turns are left out as make the rest fit into half of the context: leaving out one at a
    time would run nearly all again in each turn.

    Attributes:
        dropped_messages: how many messages after the system prompt are left out.
    """

    def __init__(
        self, messages: "Sequence[Message]", prompt: "Callable[[Sequence[Message]], list[int]]", max_seq_len: int
    ) -> None:
        """Begin with all messages.

        Args:
            messages: of the chat, oldest first, at least one.
            prompt: returns the token ids of the prompt that asks for an answer to the last of some messages.
            max_seq_len: tokens of prompt and answer together.
        """
        self._messages, self._encode, self._max_seq_len = messages, prompt, max_seq_len
        self._system = int(messages[0]["role"] in ("system", "developer"))
        users = [i for i, message in enumerate(messages) if i > self._system and message["role"] == "user"]
        self._starts = [self._system, *users]  # of the turns
        self._first = 0  # turn that is not left out

    @property
    def dropped_messages(self) -> int:
        """How many messages after the system prompt are left out."""
        return self._starts[self._first] - self._system

    def begin(self, reusable: Callable[[Sequence[int]], int]) -> list[int]:
        """Return the prompt of all messages, or of those that fit if it leaves no room for an answer.

        Of the prompts that fit, down to the first that takes half of the context, it is the one with the fewest tokens
        to run: what an earlier turn left out stays left out.

        Args:
            reusable: returns how many of a prompt's first tokens need not be run.

        Returns:
            Token ids; too many if the newest turn alone does not fit.

        Raises:
            InputError: a prompt cannot be made.
        """
        whole = self._prompt(0)
        if len(whole) < self._max_seq_len:
            return whole
        turns = range(self._first_within(self._max_seq_len - 1), self._first_within(self._max_seq_len // 2) + 1)
        prompts = {turn: self._prompt(turn) for turn in turns}
        self._first = min(turns, key=lambda turn: len(prompts[turn]) - reusable(prompts[turn]))
        return prompts[self._first]

    def shift(self, answer: Sequence[int]) -> list[int] | None:
        """Return the tokens that stay, of a chat that fills the context; None if no turn can be left out.

        Args:
            answer: the new tokens so far, which all stay.
        """
        try:
            turn = self._first_within(self._max_seq_len // 2 - len(answer), self._first + 1)
            stays = [*self._prompt(turn), *answer] if turn > self._first else []
        except InputError:  # the template refuses the rest
            return None
        if not 0 < len(stays) < self._max_seq_len:
            return None
        self._first = turn
        return stays

    def _prompt(self, turn: int) -> list[int]:
        return self._encode([*self._messages[: self._system], *self._messages[self._starts[turn] :]])

    def _first_within(self, count: int, least: int = 0) -> int:
        """The first turn, from `least` on, from which on the prompt has at most `count` tokens; else the newest."""
        newest = len(self._starts) - 1
        turns = range(least, newest)
        return min(least + bisect.bisect_left(turns, True, key=lambda at: len(self._prompt(at)) <= count), newest)
