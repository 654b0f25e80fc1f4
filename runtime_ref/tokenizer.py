"""Convert text to tokens and back with the bundle's tokenizer.json."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from runtime_ref.errors import InputError
from runtime_ref.pointers import what_stands_for
from runtime_ref.text_parts import PartTracker
from runtime_ref.text_stream import TextStream

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
    def parts(self) -> Mapping[str, Mapping[str, str]]:
        """What such a part has around its content, by the part's name. FORMAT.md, "Channels"."""
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
        self._bos, self._eos = tokens.bos, frozenset(tokens.eos)
        self._channels, self._parts = tokens.channels, tokens.parts
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

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Return the text of token ids.

        Args:
            tokens: the ids.
            special: whether special tokens give their texts; otherwise they give none.
        """
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def stream(self, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> TextStream:
        """Begin a text that is decoded token by token.

        Args:
            stop: strings that end the text.
            prompt: token ids before the text.
        """
        tracker = PartTracker(self._channels, self._eos, prompt)
        return TextStream(self.decode, stop, tracker, self._parts)
