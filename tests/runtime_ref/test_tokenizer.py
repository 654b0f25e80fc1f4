"""Streamed pieces of text join to the text of all tokens."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.tokenizer import TextTokenizer
from tests.vectors import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(bundle: Callable[[str], Path]) -> TextTokenizer:
    return TextTokenizer(bundle("demo"), read_manifest(bundle("demo")))


def test_the_vectors_are_those_of_their_script() -> None:
    assert make_tokenizer.GEMMA_SHAPE.read_text(encoding="utf-8") == make_tokenizer.gemma_shape()
    assert make_tokenizer.FILE.read_text(encoding="utf-8") == make_tokenizer.text()


def streamed(tokenizer: TextTokenizer, tokens: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.add, tokens), stream.flush()])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stream_gives_the_whole_text(tokenizer: TextTokenizer, text: str) -> None:
    """Most of these characters are several byte tokens in this vocabulary."""
    tokens = tokenizer.encode(text)
    assert tokens[0] == 2
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


def test_no_tokens_break_the_stream(tokenizer: TextTokenizer) -> None:
    """A model may generate bytes that are no character; text after them is still returned."""
    random.seed(0)
    for _ in range(200):
        tokens = [random.choice([54, 199, 300, random.randrange(2048)]) for _ in range(8)]
        assert streamed(tokenizer, [*tokens, 400, 401]).endswith(tokenizer.decode([400, 401]))


def test_characters_come_whole(tokenizer: TextTokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in tokenizer.encode("\u00e9\u20ac")[1:]]
    assert [piece for piece in pieces if piece] == ["\u00e9", "\u20ac"]


def test_broken_tokenizer_is_refused(tokenizer: TextTokenizer, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot be read as a tokenizer"):
        TextTokenizer(tmp_path, read_manifest(bundle("demo")))
