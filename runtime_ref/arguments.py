"""Check the kinds of arguments that applications pass, before anything runs on them."""

import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError


def integer(name: str, value: Any) -> int:
    """Return a whole number, also one of numpy or torch, as an int.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        InputError: it is not a whole number.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # of an object that is no number; torch raises other kinds
        pass
    raise InputError(f"{name} is {_shown(value)}, expected a whole number")


def number(name: str, value: Any) -> float:
    """Return a number, also one of numpy or torch, as a float.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        InputError: it is not a number.
    """
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise InputError(f"{name} is {_shown(value)}, expected a number")


def flag(name: str, value: Any) -> bool | None:
    """Return true, false or None as they are.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        InputError: it is something else.
    """
    if value is None or isinstance(value, bool):
        return value
    raise InputError(f"{name} is {_shown(value)}, expected true or false")


def token_ids(prompt: Any) -> list[int]:
    """Return token ids as a list of ints.

    Args:
        prompt: a sequence of whole numbers, or an array of numpy or torch with one dimension.

    Raises:
        InputError: it is of another form.
    """
    if isinstance(prompt, str | bytes | dict) or not isinstance(prompt, Iterable):
        raise InputError(f"the prompt is {_shown(prompt)}, expected text or a list of token ids")
    try:
        tokens = list(prompt)
        if not any(isinstance(token, bool) for token in tokens):
            return [operator.index(token) for token in tokens]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(
        f"the prompt is {_shown(prompt)}, expected text or a list of token ids, whole numbers; pass one prompt"
        " at a time"
    )


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple.

    Args:
        stop: texts.

    Raises:
        InputError: it is one text, whose characters would be taken for stop strings, or holds something else than text,
            or an empty one.
    """
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise InputError(f"stop is {_shown(stop)}, expected a list of texts")
    texts = tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InputError(f"a stop string is {'empty' if text == '' else _shown(text)}: expected some text")
    return texts


def suppressed_ids(suppress: Any) -> frozenset[int]:
    """Return ids of suppressed tokens as a set.

    Args:
        suppress: whole numbers, or an array of numpy or torch with one dimension.

    Raises:
        InputError: it is of another form.
    """
    if isinstance(suppress, str | bytes | Mapping) or not isinstance(suppress, Iterable):
        raise InputError(f"suppress is {_shown(suppress)}, expected a list of token ids")
    return frozenset(integer("a suppressed token id", token) for token in suppress)


def biases(logit_bias: Any) -> dict[int, float]:
    """Return biases by token id as a dict of ints and floats.

    Args:
        logit_bias: a mapping, or None for no bias.

    Raises:
        InputError: it is of another form.
    """
    if logit_bias is None:
        return {}
    if not isinstance(logit_bias, Mapping):
        raise InputError(f"logit_bias is {_shown(logit_bias)}, expected numbers by token id, such as {{42: -1.5}}")
    return {
        integer("a token id of logit_bias", token): number("a logit bias", bias) for token, bias in logit_bias.items()
    }


def path(value: Any, expected: str) -> Path:
    """Return a path.

    Args:
        value: a text or a path.
        expected: whose path it is, for the message.

    Raises:
        InputError: it is neither.
    """
    try:
        return Path(os.fsdecode(value))
    except TypeError:
        raise InputError(f"{_shown(value)}: expected the path of {expected}") from None


def text(name: str, value: Any) -> str:
    """Return a text.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        InputError: it is not a text.
    """
    if isinstance(value, str):
        return value
    raise InputError(f"{name} is {_shown(value)}, expected a text")


def callback(name: str, value: Any) -> Callable[..., Any]:
    """Return a function as it is.

    Args:
        name: the argument's name, for the message.
        value: what was passed.

    Raises:
        InputError: it cannot be called.
    """
    if callable(value):
        return value
    raise InputError(f"{name} is {_shown(value)}, expected a function")


def _shown(value: Any) -> str:
    """A value in one line of a message, shortened."""
    return f"{' '.join(repr(value).split()):.60}"


def choice(name: str, value: Any, expected: Collection[str]) -> str:
    """Return one of several words.

    Args:
        name: the argument's name, for the message.
        value: what was passed.
        expected: the words.

    Raises:
        InputError: it is none of them.
    """
    if isinstance(value, str) and value in expected:
        return value
    raise InputError(f"{name} is {_shown(value)}, expected {' or '.join(expected)}")
