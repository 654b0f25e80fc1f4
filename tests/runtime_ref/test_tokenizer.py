"""Streamed pieces of text join to the text of all tokens."""

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from exporter.checkpoint.special_tokens import SpecialTokens
from exporter.demo import PAIR
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.text_parts import PartTracker
from runtime_ref.text_stream import TextStream
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
    return "".join([*(stream.add(token).text for token in tokens), stream.flush()])


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
    pieces = [stream.add(token).text for token in tokenizer.encode("\u00e9\u20ac")[1:]]
    assert [piece for piece in pieces if piece] == ["\u00e9", "\u20ac"]


def test_broken_tokenizer_is_refused(tokenizer: TextTokenizer, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot be read as a tokenizer"):
        TextTokenizer(tmp_path, read_manifest(bundle("demo")))


def test_padding_and_truncation_of_a_training_are_not_applied(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Transformers, which trains with such a file, does not apply them either."""
    trained = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    trained.enable_truncation(4)
    trained.enable_padding(length=16, pad_token="<pad>")
    trained.save(str(tmp_path / "tokenizer.json"))
    assert len(trained.encode("Return a copy of the text").ids) == 16
    read = TextTokenizer(tmp_path, SpecialTokens(2, (1,), 0))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("Return a copy of the text with all leading whitespace removed", "Return", ""):
        assert read.encode(text) == tokenizer.encode(text)
        assert read.encode(text)[1:] == reference(text, add_special_tokens=False)["input_ids"]


class TestThoughts:
    """Tokens 0 and 9 begin and end a thought; other tokens are the letters of their number."""

    @staticmethod
    def decode(tokens: Sequence[int], special: bool = False) -> str:
        del special
        return "".join(" abcdefgh"[token] if 0 < token < 9 else "" for token in tokens)

    def stream(self, stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> TextStream:
        return TextStream(self.decode, stop, PartTracker({"thought": (0, 9)}, prompt=prompt))

    @pytest.mark.parametrize("tokens", [[1, 0, 2, 9, 3], [1, 0, 2, 0, 2, 9, 9, 3], [9, 1, 0, 9, 3], [1, 3, 0, 2]])
    def test_they_give_no_text(self, tokens: list[int]) -> None:
        stream = self.stream()
        assert "".join([*(stream.add(token).text for token in tokens), stream.flush()]) == "ac"

    @pytest.mark.parametrize(
        ("prompt", "text"), [((), "bc"), ((5, 0), "c"), ((0, 5), "c"), ((0, 9), "bc"), ((0, 9, 0), "c"), ((9,), "bc")]
    )
    def test_one_may_begin_in_the_prompt(self, prompt: tuple[int, ...], text: str) -> None:
        stream = self.stream(prompt=prompt)
        assert "".join(stream.add(token).text for token in [2, 9, 3]) == text

    def test_marks_that_earlier_turns_quote_do_not_count(self, tokenizer: TextTokenizer, tmp_path: Path) -> None:
        shutil.copyfile(PAIR / "target" / "tokenizer.json", tmp_path / "tokenizer.json")
        read = TextTokenizer(tmp_path, SpecialTokens(2, (1, 7), 0, channels={"thought": (719, 470)}))
        shown = [
            read.stream(prompt=prompt).add(812).text
            for prompt in ([2, 719, 5], [2, 719, 7, 5], [719, 7, 719], [719, 1])
        ]
        assert [bool(text) for text in shown] == [False, True, False, True]

    def test_each_channel_has_its_own_end(self) -> None:
        stream = TextStream(self.decode, (), PartTracker({"thought": (0, 9), "tool_call": (7, 8)}, prompt=[7]))
        pieces = [stream.add(token) for token in [1, 9, 2, 8, 3, 0, 4, 8, 7, 5, 9, 6]]
        assert "".join(piece.text for piece in pieces) == "cf"
        assert [piece.part[0] for piece in pieces] == [*"ttttatttttta"]

    def test_stop_strings_are_searched_around_them(self) -> None:
        stream = self.stream(stop=("ac",))
        assert [stream.add(token).text for token in (2, 0, 1, 3, 9, 1, 0, 2, 9, 3)] == ["b", *[""] * 9]
        assert stream.stopped

    def test_held_text_comes_at_the_end(self) -> None:
        stream = self.stream(stop=("ac",))
        assert [stream.add(1).text, stream.add(0).text, stream.add(2, last=True).text] == ["", "", "a"]
