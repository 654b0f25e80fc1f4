"""Which part of a text each token belongs to: the answer, or a channel such as a thought. FORMAT.md, "Channels"."""

from collections.abc import Collection, Mapping, Sequence

ANSWER, THOUGHT, TOOL_CALL = "answer", "thought", "tool_call"


class PartTracker:
    """Follows the marks of channels from token to token.

    Attributes:
        marks: ids of the tokens that begin and end channels.
        channel: name of the channel that the last token left open; None in the answer.
        opened: tokens of the prompt after the mark that opened a channel there; empty if none is open.
    """

    def __init__(
        self, channels: Mapping[str, tuple[int, int]], eos: Collection[int] = (), prompt: Sequence[int] = ()
    ) -> None:
        """Begin a text.

        Args:
            channels: ids of the tokens that begin and end each channel, by its name.
            eos: ids of the tokens that end a turn: marks before the last of them in the prompt do not count.
            prompt: token ids before the text. It begins inside a channel if they open one and do not close it.
        """
        self._begins = {begin: name for name, (begin, _) in channels.items()}
        self._ends = {end: name for name, (_, end) in channels.items()}
        self._end_of = {name: end for name, (_, end) in channels.items()}
        marks = self.marks = frozenset(self._begins.keys() | self._ends.keys())
        turn = next((i + 1 for i in reversed(range(len(prompt))) if prompt[i] in eos), 0)
        last_mark = next((i for i in reversed(range(turn, len(prompt))) if prompt[i] in marks), None)
        self.channel = None if last_mark is None else self._begins.get(prompt[last_mark])
        self.opened = list(prompt[last_mark + 1 :]) if self.channel and last_mark is not None else []

    def add(self, token: int) -> tuple[str, bool]:
        """Return the part that the next token belongs to, and whether it is a mark of that part.

        Args:
            token: the next token's id. A mark that ends a channel where none is open belongs to that channel.
        """
        if self.channel is None:
            self.channel = self._begins.get(token)
            name = self.channel or self._ends.get(token)
            return (ANSWER, False) if name is None else (name, True)
        name = self.channel
        if closed := token == self._end_of[name]:
            self.channel = None
        return name, closed
