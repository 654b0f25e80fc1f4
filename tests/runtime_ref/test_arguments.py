"""Arguments of other kinds than documented are taken for what they are, or refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime_ref.errors import InputError
from runtime_ref.streaming import Decoder, open_decoder

PROMPT = [3, 4, 5]


@pytest.fixture(scope="module")
def decoder(chat_bundle: Path) -> Decoder:
    return open_decoder(str(chat_bundle), threads=np.int64(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompt",
    [np.array(PROMPT), np.array(PROMPT, np.uint8), torch.tensor(PROMPT), tuple(PROMPT), iter(PROMPT), map(int, "345")],
    ids=lambda value: type(value).__name__,
)
def test_sequences_of_whole_numbers(prompt: Any, decoder: Decoder) -> None:
    expected = [token.id for token in decoder.stream(PROMPT, max_new_tokens=3)]
    assert [token.id for token in decoder.stream(prompt, max_new_tokens=np.int32(3))] == expected
    assert decoder.current and decoder.current.prompt == PROMPT
    assert {type(token) for token in decoder.current.prompt} == {int}


@pytest.mark.parametrize(
    "prompt",
    [
        *([PROMPT], np.array([PROMPT]), torch.tensor([PROMPT]), [3.0, 4.0], np.array([3.5]), torch.tensor([3.0])),
        *(["a"], [None], [True], None, 5, 2.5, {"a": 1}, b"text", [2**70], [-1], []),
    ],
    ids=repr,
)
def test_other_prompts_are_refused(prompt: Any, decoder: Decoder) -> None:
    with pytest.raises(InputError) as refused:
        decoder.stream(prompt)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"top_k": 5.0}, "top_k is 5.0, expected a whole number"),
        ({"top_k": "5"}, "top_k is '5'"),
        ({"top_k": True}, "top_k is True"),
        ({"max_new_tokens": 3.0}, "max_new_tokens is 3.0"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"num_draft_tokens": "auto"}, "num_draft_tokens is 'auto'"),
        ({"temperature": "1"}, "temperature is '1', expected a number"),
        ({"temperature": [1.0]}, r"temperature is \[1.0\]"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": np.array([0.5, 0.5])}, "top_p is array"),
        ({"top_p": 2}, "top-p is 2"),
        ({"stop": "end"}, "stop is 'end', expected a list of texts"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"stop": [3]}, "a stop string is 3"),
        ({"stop": None}, "stop is None"),
        ({"suppress": "5"}, "suppress is '5', expected a list of token ids"),
        ({"suppress": 5}, "suppress is 5"),
        ({"suppress": [5.0]}, "a suppressed token id is 5.0, expected a whole number"),
        ({"suppress": [-1]}, "a rule names token id -1, expected 0 to"),
        ({"logit_bias": [5]}, r"logit_bias is \[5\], expected numbers by token id"),
        ({"logit_bias": {"5": 1.0}}, "a token id of logit_bias is '5'"),
        ({"logit_bias": {5: "1"}}, "a logit bias is '1', expected a number"),
        ({"logit_bias": {5: 101}}, "the logit bias of token 5 is 101.0, expected -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "the logit bias of token 5 is nan"),
        ({"logit_bias": {10**6: 1}}, "a rule names token id 1000000"),
        ({"repetition_penalty": 0}, r"repetition penalty is 0.0, expected 0.01 to 100; 1 is none"),
        ({"repetition_penalty": "1"}, "repetition_penalty is '1', expected a number"),
        ({"presence_penalty": 2.5}, "presence penalty is 2.5, expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency penalty is nan"),
        ({"json_schema": {}, "regex": "a"}, "both json_schema and regex are given"),
        ({"regex": 5}, "regex is 5, expected a text"),
        ({"progress": 5}, "progress is 5, expected a function"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str, decoder: Decoder) -> None:
    with pytest.raises(InputError, match=message):
        decoder.stream(PROMPT, **options)


def test_numbers_of_numpy_and_torch(decoder: Decoder) -> None:
    options = {"temperature": np.float32(1), "top_p": torch.tensor(0.5), "top_k": torch.tensor(7), "seed": np.uint64(9)}
    expected = decoder.stream(PROMPT, max_new_tokens=5, temperature=1.0, top_p=0.5, top_k=7, seed=9)
    tokens = [token.id for token in expected]
    assert [token.id for token in decoder.stream(PROMPT, max_new_tokens=5, **options)] == tokens  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "messages",
    [
        *("hello", {"role": "user", "content": "a"}, None, 3, ["hello"], [None], [{}], [{"role": "user"}]),
        *([{"role": "user", "content": None}], [{"role": 3, "content": "a"}], [{"role": "user", "content": ["a"]}]),
        *([{"role": "nobody", "content": "a"}], []),
    ],
    ids=repr,
)
def test_other_messages_are_refused(messages: Any, decoder: Decoder) -> None:
    with pytest.raises(InputError) as refused:
        decoder.chat(messages)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("threads", [0, -1, 1.0, "2", True])
def test_threads(threads: Any, bundle: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="threads is"):
        open_decoder(bundle("tiny"), threads)


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_paths(path: Any) -> None:
    with pytest.raises(InputError, match="expected the path of a bundle's directory"):
        open_decoder(path)
