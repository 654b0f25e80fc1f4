"""Texts as token ids: the package's own, a user's, and those that a target writes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.special_tokens import suppression
from exporter.texts.documents import CALIBRATION, HELD_OUT, documents
from exporter.texts.token_texts import MAX_TEXT_TOKENS, MAX_TOKENS, token_texts
from exporter.texts.writing import NUM_TEXTS, TEXT_TOKENS, write_texts
from runtime_ref.errors import InputError
from runtime_ref.tokenizer import TextTokenizer
from tests.chats import save_chat_pair

Pairs = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("name", [CALIBRATION, HELD_OUT])
def test_the_sets_hold_prose_code_and_chats(name: str) -> None:
    found = documents(name)
    assert {document.kind for document in found} == {"prose", "code", "chat"}
    assert len({document.language for document in found if document.kind == "prose"}) >= 10
    for chat in (document for document in found if document.kind == "chat"):
        roles = [message["role"] for message in chat.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in chat.messages)


def test_no_text_is_calibrated_on_and_measured_on() -> None:
    """Not even a line."""
    lines = [
        {line for d in documents(name) for line in d.text.splitlines() if len(line) > 30}
        for name in (CALIBRATION, HELD_OUT)
    ]
    assert not lines[0] & lines[1]


def test_texts_of_a_pair_with_a_tokenizer(pair_dirs: Pairs) -> None:
    pair = open_pair(*pair_dirs("demo"))
    texts = token_texts(pair)
    tokenizer = TextTokenizer(pair.target_checkpoint.directory, pair.tokens)
    assert len(texts.kinds) == len(texts.texts)
    assert all(text[0] == pair.tokens.bos and 1 < len(text) <= MAX_TEXT_TOKENS for text in texts.texts)
    assert tokenizer.decode(list(texts.texts[0])).startswith("The ferry left")
    assert texts.sha256 != token_texts(pair, name=HELD_OUT).sha256


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    pair = open_pair(*save_chat_pair(tmp_path))
    texts = token_texts(pair)
    tokenizer = TextTokenizer(pair.target_checkpoint.directory, pair.tokens)
    chat = next(text for text, kind in zip(texts.texts, texts.kinds, strict=True) if kind == "chat en")
    assert "user: I have" not in tokenizer.decode(list(chat))


def test_a_target_without_tokenizer_writes_its_texts(pair_dirs: Pairs) -> None:
    """Sampled from its own distribution: the same on every run, another one with another seed, suppressed ids never."""
    pair = open_pair(*pair_dirs("tiny"))
    texts = write_texts(pair)
    assert (len(texts), len(texts[0])) == (NUM_TEXTS, TEXT_TOKENS)
    assert {text[0] for text in texts} == {pair.tokens.bos}
    assert texts == write_texts(pair)
    assert texts != write_texts(pair, seed=1)
    steps: list[tuple[str, int]] = []
    assert token_texts(pair, progress=lambda *step: steps.append(step)).texts == tuple(map(tuple, texts))
    assert steps == [(f"token {n} of {TEXT_TOKENS}", 1) for n in range(2, TEXT_TOKENS + 1)]
    suppressed = tuple(range(3, 200))
    tokens = replace(pair.tokens, suppressed=suppressed)
    weights = {**pair.checkpoint_weights, **suppression(tokens, pair.target.vocab_size)}
    few = write_texts(replace(pair, tokens=tokens, checkpoint_weights=weights))
    assert not set(suppressed) & {token for text in few for token in text[1:]}
    logits = pair.load_target()(
        torch.tensor([pair.tokens.bos]), torch.tensor([0]), torch.tensor([0]), _kv(pair.target)
    ).logits[0]
    second = torch.bincount(torch.tensor([text[1] for text in texts]), minlength=len(logits)) / NUM_TEXTS
    expected = logits.softmax(0)
    assert float(((second > 0) * expected).sum()) > float((second > 0).float().mean())  # likely ones are chosen


def _kv(config: object) -> list[torch.Tensor]:
    from exporter.modeling.target import empty_kv

    return empty_kv(config, 1)  # type: ignore[arg-type]


def test_a_beginning_that_the_target_lacks(pair_dirs: Pairs, tmp_path: Path) -> None:
    """A bundle may name such a token; nothing can be written after it."""
    pair = open_pair(*pair_dirs("tiny"))
    pair = replace(pair, tokens=replace(pair.tokens, bos=300))
    with pytest.raises(InputError, match=r"bos_token_id is 300, expected less than the 256 tokens"):
        write_texts(pair)
    (tmp_path / "ids.json").write_text("[[7, 8], [9]]")
    assert token_texts(pair, tmp_path / "ids.json").texts == ((7, 8), (9,))


def test_chats_that_the_template_refuses_are_plain_text(tmp_path: Path) -> None:
    target, drafter = save_chat_pair(tmp_path)
    (target / "chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    texts = token_texts(open_pair(target, drafter))
    assert texts.source.endswith("(chats as plain text: the chat template refuses them)")
    assert "chat en" in texts.kinds


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(pair_dirs: Pairs) -> None:
    pair = open_pair(*pair_dirs("demo"))
    with pytest.raises(
        InputError, match=r"gives a text of this package the token \d+, expected ids below 100; restore"
    ):
        token_texts(replace(pair, target=replace(pair.target, vocab_size=100)))


def test_a_users_texts_are_cut_into_pieces(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair, bos = open_pair(*pair_dirs("demo")), 2
    (tmp_path / "mine.txt").write_text("Return the number of items. " * 100, encoding="utf-8")
    texts = token_texts(pair, tmp_path / "mine.txt")
    assert texts.source == "mine.txt"
    assert len(texts.texts) > 1
    assert all(text[0] == bos and len(text) <= MAX_TEXT_TOKENS for text in texts.texts)
    (tmp_path / "ids.json").write_text(json.dumps([[2, 7, 8], [9]]))
    assert token_texts(pair, tmp_path / "ids.json").texts == ((2, 7, 8), (2, 9))


@pytest.mark.parametrize(
    ("name", "content", "pair_name", "message"),
    [
        ("t.txt", " \n ", "demo", "is empty, expected text"),
        ("t.txt", "Return it. " * MAX_TOKENS, "demo", f"at most {MAX_TOKENS} are used"),
        ("t.json", "[5000]", "demo", "has token 5000, expected ids from 0 to 2047"),
        ("t.txt", "Return it.", "tiny", "has no tokenizer.json; give"),
        ("t.txt", b"\xff\xfe", "demo", "cannot be read as text in UTF-8"),
        ("absent.txt", None, "demo", "cannot be read as text in UTF-8"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(
    name: str, content: str | bytes | None, pair_name: str, message: str, pair_dirs: Pairs, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        token_texts(open_pair(*pair_dirs(pair_name)), tmp_path / name)
