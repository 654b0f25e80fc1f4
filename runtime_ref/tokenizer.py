"""Text to tokens and back, by the bundle's tokenizer.json."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from runtime_ref.errors import InputError

TOKENIZER = "tokenizer.json"


class Ends(Protocol):
    """The tokens that begin and end a text: of a manifest, or of a checkpoint that has none yet."""

    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> Collection[int]: ...


class TextTokenizer:
    """A tokenizer.json, with the beginning-of-text token that Gemma expects before every prompt."""

    def __init__(self, bundle: Path, ends: Ends) -> None:
        """Raises InputError if the bundle has no tokenizer, or one that cannot be read."""
        path = bundle / TOKENIZER
        if not path.exists():
            raise InputError(f"{bundle}: has no {TOKENIZER}; pass --prompt-ids, or export a checkpoint that has one")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: cannot be read as a tokenizer ({error}); export the bundle again") from error
        self._bos = ends.bos
        # Spelled out for chat templates. Of several end tokens the lowest is Gemma's `<eos>`; others end a turn only.
        ids = {"bos_token": ends.bos, "eos_token": min(ends.eos, default=ends.bos)}
        named = {name: self._tokenizer.id_to_token(token) for name, token in ids.items()}
        self.special = {name: token for name, token in named.items() if token is not None}

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, the first of them the beginning-of-text token, added if the text does not spell it.

        Raises:
            InputError: the text has characters that are none, as from a terminal in another encoding.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid UTF-8 ({error.reason}); pass well-formed text") from error
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """Text as its tokens come, up to any of the stop strings."""
        return TextStream(self.decode, stop)


class TextStream:
    """Turns tokens into text as they come, holding back incomplete characters and what may become a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        # Tokens whose text was given out, then those whose text was not; older ones are no longer needed as context.
        self._given: list[int] = []
        self._held: list[int] = []
        self._maybe = ""  # complete characters that may begin a stop string
        self.stopped = False

    def add(self, token: int, last: bool = False) -> str:
        """The text that this token completes, possibly none; after the last token of a text all that is left.

        A stop string sets `stopped`, and neither it nor anything after it is given out.
        """
        self._held.append(token)
        found = self._pending()
        if found.endswith("\ufffd") and not last:
            found = ""
        else:
            self._given, self._held = self._held, []
        return self._without_stop(found, last)

    def flush(self) -> str:
        """The rest, at the end of a text, incomplete characters included."""
        found = self._pending()
        self._given, self._held = self._held or self._given, []
        return self._without_stop(found, last=True)

    def _pending(self) -> str:
        return self._decode(self._given + self._held)[len(self._decode(self._given)) :]

    def _without_stop(self, found: str, last: bool) -> str:
        text = self._maybe + found
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if self.stopped or ends:
            self.stopped, self._maybe = True, ""
            return text[: min(ends, default=0)]
        longest = 0 if last else max((_begun(stop, text) for stop in self._stop), default=0)
        self._maybe = text[len(text) - longest :]
        return text[: len(text) - longest]


def _begun(stop: str, text: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
