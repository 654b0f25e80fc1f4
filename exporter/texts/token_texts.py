"""Choose texts for a pair and turn them into token ids."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.side_files import chat_template
from exporter.files import write_file
from exporter.texts.documents import CALIBRATION, HELD_OUT, Document, documents
from exporter.texts.writing import write_texts
from runtime_ref.chat import ChatTemplate
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress, file_sha256
from runtime_ref.prompts import read_prompt_ids
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer

MAX_TEXT_TOKENS = 256  # longer texts are cut into pieces, each with the beginning-of-text token
REFUSED = " (chats as plain text: the chat template refuses them)"
WRITTEN = "texts that the target wrote, sampled at temperature 1"
HELD_OUT_TOKENS = 32  # of each text that the target writes to compare on
MAX_TOKENS = 16384  # of a user's file: calibration takes time in proportion


@dataclass(frozen=True)
class TokenTexts:
    """Texts as token ids.

    Attributes:
        texts: token ids of each text, from the beginning-of-text token on.
        source: what they are, for people and for the manifest.
        kinds: kind of each text, such as "prose de".
    """

    texts: tuple[tuple[int, ...], ...]
    source: str
    kinds: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all texts."""
        return sum(map(len, self.texts))

    @property
    def sha256(self) -> str:
        """Digest of the token ids."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def has_tokenizer(pair: Pair) -> bool:
    """Return whether a pair's target has a tokenizer.json."""
    return (pair.target_checkpoint.directory / TOKENIZER).is_file()


def token_texts(
    pair: Pair,
    file: Path | None = None,
    name: str = CALIBRATION,
    max_text_tokens: int = MAX_TEXT_TOKENS,
    progress: Progress = lambda *_: None,
) -> TokenTexts:
    """Return texts for a pair: a user's, else the package's, else, without a tokenizer, what the target writes.

    Args:
        pair: the pair, whose tokenizer is used.
        file: a text file in UTF-8, or a JSON file of token ids as `--prompt-ids` takes it; None for no file.
        name: which set of the package, `CALIBRATION` or `HELD_OUT`.
        max_text_tokens: maximum length of a text; at most `MAX_TEXT_TOKENS`.
        progress: called while the target writes, with 1 for each of at most `TEXT_TOKENS` tokens of its texts.

    Raises:
        InputError: the file cannot be read, is empty or too long, holds ids that the target lacks, or is a text while
            the checkpoint has no tokenizer; or the target cannot write texts.
    """
    directory = pair.target_checkpoint.directory
    if file is not None and file.suffix == ".json":
        return _checked(_pieces(pair, read_prompt_ids(file)), pair, file)
    if file is not None:
        if not has_tokenizer(pair):
            raise InputError(f"{directory}: has no {TOKENIZER}; give {file} as a JSON file of token ids")
        try:
            text = file.read_text(encoding="utf-8-sig")  # without the mark that some editors begin a file with
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as text in UTF-8 ({error}); give another file") from error
        ids = TextTokenizer(directory, pair.tokens).encode(text) if text.strip() else []
        return _checked(_pieces(pair, [ids]), pair, file)
    if not has_tokenizer(pair):
        return TokenTexts(_tuples(write_texts(pair, progress=progress)), WRITTEN)
    return package_texts(pair, documents(name), f"the package's set {name}", max_text_tokens)


def fitting_texts(pair: Pair, file: Path | None = None, progress: Progress = lambda *_: None) -> TokenTexts:
    """Return texts to fit something on, as `token_texts` does, without a file always with what the target writes.

    The package's show many languages and uses, the target's own what it was trained on.
    """
    texts = token_texts(pair, file, progress=progress)
    if file is not None or texts.source == WRITTEN:
        return texts
    return TokenTexts((*texts.texts, *_tuples(write_texts(pair, progress=progress))), f"{texts.source} and {WRITTEN}")


def kept_texts(file: Path | None, pair: Pair, make: Callable[[], TokenTexts]) -> TokenTexts:
    """Return texts that were kept in a file for the same checkpoint, else make them and keep them there.

    At full size a target writes for minutes, which a command that goes on after a kill need not do again.

    Args:
        file: JSON that this function writes; anything else is replaced. None to keep nothing.
        pair: the pair that the texts are for.
        make: makes them.
    """
    if file is None:
        return make()
    directory = pair.target_checkpoint.directory
    key = {
        "version": version("gemma-mtp-export"),
        "directory": str(directory),
        "files": pair.stamps,
        "config": str((pair.target, pair.tokens)),
        "tokenizer": file_sha256(directory / TOKENIZER) if has_tokenizer(pair) else None,
        "template": chat_template(directory),
    }
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return TokenTexts(_tuples(kept["texts"]), kept["source"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none are kept
    texts = make()
    write_file(file, json.dumps({"key": key, "source": texts.source, "texts": texts.texts}).encode())
    return texts


def held_out_texts(pair: Pair, progress: Progress = lambda *_: None) -> TokenTexts:
    """Return texts to compare on, none of which is fitted on: the package's, else others that the target writes.

    Args:
        pair: the pair.
        progress: as for `token_texts`, for at most `HELD_OUT_TOKENS` tokens.
    """
    if has_tokenizer(pair):
        return token_texts(pair, name=HELD_OUT)
    texts = write_texts(pair, seed=1, num_texts=16, text_tokens=HELD_OUT_TOKENS, progress=progress)
    return TokenTexts(_tuples(texts), WRITTEN)


def package_texts(
    pair: Pair, chosen: Sequence[Document], source: str, max_text_tokens: int = MAX_TEXT_TOKENS
) -> TokenTexts:
    """Turn documents into token ids, chats by the checkpoint's template if it has one that renders them.

    Args:
        pair: a pair with a tokenizer.
        chosen: the documents.
        source: what they are, for people; chats that the template refuses are plain text, which is added here.
        max_text_tokens: maximum length of a text; longer ones are cut into pieces.

    Raises:
        InputError: the tokenizer gives ids that the target lacks.
    """
    directory = pair.target_checkpoint.directory
    tokenizer, jinja = TextTokenizer(directory, pair.tokens), chat_template(directory)
    template = jinja and ChatTemplate(jinja, str(directory), "restore the checkpoint", tokenizer.special_tokens)
    texts, kinds, refused = [], [], False
    for document in chosen:
        text = document.text
        if document.kind == "chat" and template:
            try:
                text = template.render(document.messages, ask=False)
            except InputError:
                refused = True
        for piece in _pieces(pair, [tokenizer.encode(text)], max_text_tokens):
            texts.append(piece)
            kinds.append(f"{document.kind} {document.language}")
    if wrong := [token for text in texts for token in text if token >= pair.target.vocab_size]:
        raise InputError(
            f"{directory / TOKENIZER}: gives a text of this package the token {wrong[0]}, expected ids below"
            f" {pair.target.vocab_size}; restore the target's tokenizer, or pass other texts as JSON: --calibration or"
            " --no-calibrate (`export`), --text (`cluster`), --prompt-ids (`parity`)"
        )
    return TokenTexts(_tuples(texts), source + REFUSED * refused, tuple(kinds))


def _pieces(pair: Pair, texts: Iterable[Sequence[int]], max_text_tokens: int = MAX_TEXT_TOKENS) -> list[list[int]]:
    """Cut token ids into pieces that begin with the beginning-of-text token, if the target has it."""
    bos, begin = pair.tokens.bos, [pair.tokens.bos] * (pair.tokens.bos < pair.target.vocab_size)
    size = max(1, min(MAX_TEXT_TOKENS, max_text_tokens, pair.target.max_position_embeddings) - 1)
    pieces = []
    for text in texts:
        ids = list(text[1:] if text[:1] == [bos] else text)
        pieces += [[*begin, *ids[start : start + size]] for start in range(0, len(ids), size)]
    return pieces


def _checked(pieces: list[list[int]], pair: Pair, file: Path) -> TokenTexts:
    count, vocab_size = sum(map(len, pieces)), pair.target.vocab_size
    if not pieces:
        raise InputError(f"{file}: is empty, expected text; give some thousand words like those of your users")
    if count > MAX_TOKENS:
        raise InputError(f"{file}: has {count} tokens, at most {MAX_TOKENS} are used; give a part of it")
    if wrong := [token for piece in pieces for token in piece if not 0 <= token < vocab_size]:
        raise InputError(
            f"{file}: has token {wrong[0]}, expected ids from 0 to {vocab_size - 1}; make it with the target's"
            " tokenizer"
        )
    return TokenTexts(_tuples(pieces), file.name)


def _tuples(texts: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, texts))
