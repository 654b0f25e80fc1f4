"""Text to tokens and back, by the bundle's tokenizer.json."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from runtime_ref.errors import InputError
from runtime_ref.manifest import Manifest


class TextTokenizer:
    """A tokenizer.json, with the beginning-of-text token that Gemma expects before every prompt."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        """Raises InputError if the bundle has no tokenizer, or one that cannot be read."""
        path = bundle / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{bundle}: has no tokenizer.json; pass --prompt-ids, or export a checkpoint that has one")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: cannot be read as a tokenizer ({error}); export the bundle again") from error
        self._bos = manifest.bos

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, the first of them the beginning-of-text token.

        Raises:
            InputError: the text has characters that are none, as from a terminal in another encoding.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid UTF-8 ({error.reason}); pass well-formed text") from error
        ids = list(self._tokenizer.encode(text).ids)
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self.decode)


class TextStream:
    """Turns tokens into text as they come, holding back incomplete characters."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # Tokens whose text was given out, then those whose text was not; older ones are no longer needed as context.
        self._given: list[int] = []
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._held.append(token)
        return "" if self._pending().endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        """The rest, at the end of a text, incomplete characters included."""
        text = self._pending()
        if self._held:
            self._given, self._held = self._held, []
        return text

    def _pending(self) -> str:
        return self._decode(self._given + self._held)[len(self._decode(self._given)) :]
