"""Text to tokens and back, by the bundle's tokenizer.json."""

from pathlib import Path

from tokenizers import Tokenizer, decoders

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
        """Token ids of a prompt, the first of them the beginning-of-text token."""
        ids = list(self._tokenizer.encode(text).ids)
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self._tokenizer)


class TextStream:
    """Turns tokens into text as they come, holding back incomplete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream = tokenizer, decoders.DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        return self._stream.step(self._tokenizer, token) or ""
