"""Convert text to tokens and back with the bundle's tokenizer.json."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from runtime_ref.errors import InputError

TOKENIZER = "tokenizer.json"


class BoundaryTokens(Protocol):
    """The token ids that begin and end a text, of a manifest or of a checkpoint."""

    @property
    def bos(self) -> int:
        """Id of the beginning-of-text token."""
        ...

    @property
    def eos(self) -> Collection[int]:
        """Ids of the tokens that end a text."""
        ...


class TextTokenizer:
    """A tokenizer.json, with the beginning-of-text token that Gemma expects before every prompt.

    Attributes:
        special_tokens: texts of the special tokens that chat templates name, by `bos_token` and `eos_token`.
    """

    def __init__(self, bundle: Path, tokens: BoundaryTokens) -> None:
        """Load a tokenizer.

        Args:
            bundle: directory that has a tokenizer.json.
            tokens: ids of the tokens that begin and end a text, for instance the manifest.

        Raises:
            InputError: the bundle has no tokenizer, or one that cannot be read.
        """
        path = bundle / TOKENIZER
        if not path.exists():
            raise InputError(f"{bundle}: has no {TOKENIZER}; pass --prompt-ids, or export a checkpoint that has one")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: cannot be read as a tokenizer ({error}); export the bundle again") from error
        self._bos = tokens.bos
        # Of several end tokens the lowest is Gemma's `<eos>`; the others end a turn only.
        ids = {"bos_token": tokens.bos, "eos_token": min(tokens.eos, default=tokens.bos)}
        named = {name: self._tokenizer.id_to_token(token) for name, token in ids.items()}
        self.special_tokens = {name: token for name, token in named.items() if token is not None}

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

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """Begin a text that is decoded token by token.

        Args:
            stop: strings that end the text.
        """
        return TextStream(self.decode, stop)


class TextStream:
    """Decodes tokens as they come, holding back incomplete characters and text that may begin a stop string.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        """Begin a text.

        Args:
            decode: converts token ids to text.
            stop: strings that end the text.
        """
        self._decode, self._stop = decode, stop
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
