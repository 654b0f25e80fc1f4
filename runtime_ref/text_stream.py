"""Decode tokens to text as they come, the answer and each channel apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime_ref.text_parts import ANSWER, TOOL_CALL, PartTracker


class Decode(Protocol):
    """Converts token ids to text."""

    def __call__(self, tokens: Sequence[int], special: bool = False, /) -> str:
        """Return the text of token ids; special tokens give theirs if `special` is true, else none."""
        ...


@dataclass(frozen=True)
class Piece:
    """The text that a token completes.

    Attributes:
        text: of the answer. It may come with a token of a channel: text that was held back, at the end.
        part: what the token belongs to, `answer` or the name of a channel.
        part_text: of that part; the same as `text` in the answer.
    """

    text: str
    part: str = ANSWER
    part_text: str = ""


class TextStream:
    """Decodes tokens as they come, holding back incomplete characters and text that may begin a stop string.

    Thoughts and other channels are no part of the answer: their tokens give it no text, and are not searched for stop
    strings. Each channel that was opened is in `channels`.

    Attributes:
        stopped: whether a stop string came.
        channels: what was opened, in order; the last may still be open.
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str] = (),
        tracker: PartTracker | None = None,
        parts: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Begin a text.

        Args:
            decode: converts token ids to text.
            stop: strings that end the text.
            tracker: tells which part each token belongs to; None if everything is answer.
            parts: what each channel has around its content, by its name.
        """
        self._decode, self._stop, self._tracker = decode, stop, tracker or PartTracker({})
        self._answer, self._forms, self._count = _Decoding(decode, special=False), parts or {}, 0
        self._possible_stop = ""  # complete characters that may begin a stop string
        self.stopped = False
        self.channels: list[Channel] = []
        if self._tracker.channel is not None:
            channel = self._open(self._tracker.channel)
            for token in self._tracker.opened:  # what the prompt wrote in it is no new text
                channel.add(token, last=False)
            channel.text = ""

    def add(self, token: int, last: bool = False) -> Piece:
        """Return the text that a token completes, which may be empty.

        A stop string sets `stopped`; neither it nor anything after it is returned.

        Args:
            token: the next token id.
            last: whether it is the text's last token; then all remaining text is returned.
        """
        was_open = self._tracker.channel is not None
        part, is_mark = self._tracker.add(token)
        self._count += 1
        if part == ANSWER:
            text = self._without_stop(self._answer.add(token, last), last)
            return Piece(text, ANSWER, text)
        text = self.flush() if last else ""
        if is_mark and not was_open:
            if self._tracker.channel is not None:  # else a mark that ends what is not open
                self._open(part)
            return Piece(text, part)
        return Piece(text, part, self.channels[-1].close() if is_mark else self.channels[-1].add(token, last))

    def flush(self) -> str:
        """Return the answer's remaining text at the end, incomplete characters included."""
        return self._without_stop(self._answer.flush(), last=True)

    def _open(self, name: str) -> "Channel":
        form = self._forms.get(name, {})
        # A call is parsed as a whole, with the special tokens around its texts.
        around = ("", "") if name == TOOL_CALL else (form.get("before", ""), form.get("after", ""))
        self.channels.append(Channel(name, self._count - 1, _Decoding(self._decode, name == TOOL_CALL), *around))
        return self.channels[-1]

    def _without_stop(self, new: str, last: bool) -> str:
        """The new text up to a stop string, or up to characters that may begin one."""
        text = self._possible_stop + new
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if self.stopped or ends:
            self.stopped, self._possible_stop = True, ""
            return text[: min(ends, default=0)]
        longest = 0 if last else max((_overlap(text, stop[:-1]) for stop in self._stop), default=0)
        self._possible_stop = text[len(text) - longest :]
        return text[: len(text) - longest]


class Channel:
    """What a channel holds, without what the template writes around it.

    Attributes:
        name: `thought`, `tool_call` or another.
        start: index of the token that opened it, counted from the first new one; -1 for one of the prompt.
        text: its text so far.
        closed: whether the token that ends it came.
    """

    def __init__(self, name: str, start: int, decoding: "_Decoding", before: str, after: str) -> None:
        """Open a channel.

        Args:
            name: its name.
            start: index of the token that opened it.
            decoding: an empty one, for its tokens.
            before: text that is dropped where the channel begins with it.
            after: text that is dropped where the channel ends with it.
        """
        self.name, self.start, self.text, self.closed = name, start, "", False
        self._decoding, self._before, self._after = decoding, before, after
        self._held = ""

    def add(self, token: int, last: bool) -> str:
        """Return the text that a token completes.

        Args:
            token: a token inside the channel.
            last: whether nothing comes after it.
        """
        return self._give(self._held + self._decoding.add(token, last), last)

    def close(self) -> str:
        """Return the remaining text at the token that ends the channel."""
        self.closed = True
        return self._give(self._held + self._decoding.flush(), last=True)

    def _give(self, text: str, last: bool) -> str:
        if self._before:
            if not last and len(text) < len(self._before) and self._before.startswith(text):
                self._held = text
                return ""
            text, self._before = text.removeprefix(self._before), ""
        kept = _overlap(text, self._after)
        self._held = "" if last else text[len(text) - kept :]
        given = text.removesuffix(self._after) if self.closed else text[: len(text) - (0 if last else kept)]
        self.text += given
        return given


class _Decoding:
    """Tokens of one part, decoded as they come."""

    def __init__(self, decode: Decode, special: bool) -> None:
        self._decode, self._special = decode, special
        # Tokens whose text was returned, then those whose text was not; older ones are no longer needed as context.
        self._returned: list[int] = []
        self._held: list[int] = []

    def add(self, token: int, last: bool) -> str:
        """The text that a token completes; nothing while it ends inside a character, unless it is the last."""
        self._held.append(token)
        new = self._pending()
        if new.endswith("\ufffd") and not last:
            return ""
        self._returned, self._held = self._held, []
        return new

    def flush(self) -> str:
        """The remaining text, incomplete characters included."""
        new = self._pending()
        self._returned, self._held = self._held or self._returned, []
        return new

    def _pending(self) -> str:
        before = self._decode(self._returned, self._special)
        return self._decode(self._returned + self._held, self._special)[len(before) :]


def _overlap(text: str, other: str) -> int:
    """How many characters at the end of a text begin another."""
    return next((n for n in range(min(len(other), len(text)), 0, -1) if text.endswith(other[:n])), 0)
