"""Convert text to tokens and back with the bundle's tokenizer.json."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from runtime_ref.errors import InputError
from runtime_ref.pointers import what_stands_for

TOKENIZER = "tokenizer.json"


class BoundaryTokens(Protocol):
    """Special tokens of a manifest or of a checkpoint."""

    @property
    def bos(self) -> int:
        """Id of the beginning-of-text token."""
        ...

    @property
    def eos(self) -> Collection[int]:
        """Ids of the tokens that end a text."""
        ...

    @property
    def channels(self) -> Mapping[str, tuple[int, int]]:
        """Ids of the tokens that begin and end a part of the text that is no answer, by the part's name."""
        ...

    @property
    def names(self) -> Mapping[str, str]:
        """Texts of special tokens by the names under which chat templates know them."""
        ...


def read_tokenizer(path: Path, remedy: str) -> Tokenizer:
    """Read a tokenizer.json as transformers does: padding and truncation that a training left in it are switched off.

    Args:
        path: the file.
        remedy: what an error asks the user to do.

    Raises:
        InputError: it is only a pointer to its content, or cannot be read.
    """
    if (instead := what_stands_for(path)) is not None:
        raise InputError(f"{path}: is {instead}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: cannot be read as a tokenizer ({error}); {remedy}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TextTokenizer:
    """A tokenizer.json, with the beginning-of-text token that Gemma expects before every prompt.

    Attributes:
        special_tokens: texts of the special tokens by the names under which chat templates know them.
    """

    def __init__(self, bundle: Path, tokens: BoundaryTokens) -> None:
        """Load a tokenizer.

        Args:
            bundle: directory that has a tokenizer.json.
            tokens: special tokens, for instance the manifest.

        Raises:
            InputError: the bundle has no tokenizer, or one that cannot be read.
        """
        path = bundle / TOKENIZER
        if not path.exists():
            raise InputError(f"{bundle}: has no {TOKENIZER}; pass --prompt-ids, or export a checkpoint that has one")
        self._tokenizer = read_tokenizer(path, "export the bundle again")
        self._bos, self._eos, self._channels = tokens.bos, frozenset(tokens.eos), tokens.channels
        # Of several end tokens the lowest is Gemma's `<eos>`; the others end a turn only.
        ids = {"bos_token": tokens.bos, "eos_token": min(tokens.eos, default=tokens.bos)}
        named = {name: self._tokenizer.id_to_token(token) for name, token in ids.items()}
        self.special_tokens = {name: token for name, token in named.items() if token is not None} | dict(tokens.names)

    def encode(self, text: str) -> list[int]:
        """Convert a prompt to token ids.

        Args:
            text: the prompt; special tokens may be spelled out in it.

        Returns:
            Token ids, the first of them the beginning-of-text token, which is added if the text does not spell it.

        Raises:
            InputError: the text has surrogates, as from a terminal in another encoding, so it is no valid UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid UTF-8 ({error.reason}); pass well-formed text") from error
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> "TextStream":
        """Begin a text that is decoded token by token.

        Args:
            stop: strings that end the text.
            prompt: token ids before the text. It begins inside a channel if those after the last end token, which ends
                the last turn, begin one and do not end it.
        """
        ends = [i for i, token in enumerate(prompt) if token in self._eos]
        return TextStream(self.decode, stop, self._channels.values(), prompt[ends[-1] + 1 :] if ends else prompt)


class TextStream:
    """Decodes tokens as they come, holding back incomplete characters and text that may begin a stop string.

    Thoughts and other channels are no part of it: their tokens give no text, and are not searched for stop strings.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        channels: Iterable[tuple[int, int]] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        """Begin a text.

        Args:
            decode: converts token ids to text.
            stop: strings that end the text.
            channels: ids of the tokens that begin and end each channel.
            prompt: token ids before the text, of its own turn.
        """
        self._decode, self._stop, self._ends = decode, stop, dict(channels)
        self._marks = {mark for pair in self._ends.items() for mark in pair}
        last_mark = next((token for token in reversed(prompt) if token in self._marks), None)
        self._until = None if last_mark is None else self._ends.get(last_mark)  # what ends the channel, inside one
        # Tokens whose text was returned, then those whose text was not; older ones are no longer needed as context.
        self._returned: list[int] = []
        self._held: list[int] = []
        self._possible_stop = ""  # complete characters that may begin a stop string
        self.stopped = False

    def add(self, token: int, last: bool = False) -> str:
        """Return the text that a token completes, which may be empty.

        A stop string sets `stopped`; neither it nor anything after it is returned.

        Args:
            token: the next token id.
            last: whether it is the text's last token; then all remaining text is returned.
        """
        if self._is_outside(token):
            return self.flush() if last else ""
        self._held.append(token)
        new = self._pending()
        if new.endswith("\ufffd") and not last:
            new = ""
        else:
            self._returned, self._held = self._held, []
        return self._without_stop(new, last)

    def flush(self) -> str:
        """Return the remaining text at the end, incomplete characters included."""
        new = self._pending()
        self._returned, self._held = self._held or self._returned, []
        return self._without_stop(new, last=True)

    def _is_outside(self, token: int) -> bool:
        """Whether a token is no part of the answer: a mark of a channel, or inside one."""
        if self._until is None:
            self._until = self._ends.get(token)
            return token in self._marks
        if token == self._until:
            self._until = None
        return True

    def _pending(self) -> str:
        return self._decode(self._returned + self._held)[len(self._decode(self._returned)) :]

    def _without_stop(self, new: str, last: bool) -> str:
        """The new text up to a stop string, or up to characters that may begin one."""
        text = self._possible_stop + new
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if self.stopped or ends:
            self.stopped, self._possible_stop = True, ""
            return text[: min(ends, default=0)]
        longest = 0 if last else max((_stop_prefix(stop, text) for stop in self._stop), default=0)
        self._possible_stop = text[len(text) - longest :]
        return text[: len(text) - longest]


def _stop_prefix(stop: str, text: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
