"""Read the calls of tools that a model writes. FORMAT.md, "Calls of tools", specifies the two syntaxes."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PAIRS, JSON = "pairs", "json"  # syntaxes of calls
JSON_ARGUMENTS = ("arguments", "parameters")  # keys of a call in JSON that hold its arguments
MAX_DEPTH = 64  # of a value inside others, so that no text exhausts the stack


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits:.20} is too large")
    return number


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant, parse_float=_finite)


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, as the model wrote it.

    Attributes:
        id: stands for the call in the conversation: the answer to it names it.
        name: of the tool; empty if the call could not be read.
        arguments: by name, of JSON's types.
        text: the call as it was written, special tokens spelled out.
        problem: why it could not be read; empty if it could.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]
    text: str
    problem: str = ""

    def as_message(self) -> dict[str, Any]:
        """Return the call as an item of a message's `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


def read_call(text: str, form: Mapping[str, str], number: str = "", closed: bool = True) -> ToolCall:
    """Read a call; one that is malformed is returned with its problem.

    Args:
        text: what stands between the marks of a call.
        form: the manifest's `tokens.parts.tool_call`: `before` and `after`, texts around the call, its `syntax`, and
            `quote`, the text before and after each text in it.
        number: the call's `id`.
        closed: whether the mark that ends the call came.
    """
    read = _SYNTAXES.get(form.get("syntax", ""))
    try:
        if read is None:
            raise ValueError("the bundle does not say how calls are written")
        if not closed:
            raise ValueError("the call has no end")
        before, after, inner = form.get("before", "").strip(), form.get("after", "").strip(), text.strip()
        if not (inner.startswith(before) and inner.endswith(after) and len(inner) >= len(before) + len(after)):
            raise ValueError(f"expected {before!r} at its beginning and {after!r} at its end")
        name, arguments = read(inner[len(before) : len(inner) - len(after)], form.get("quote", ""))
        json.dumps([name, arguments], ensure_ascii=False).encode()  # half a character cannot go into the next prompt
    except UnicodeEncodeError:
        return ToolCall(number, "", {}, text, "a text in it is not valid UTF-8")
    except ValueError as error:
        return ToolCall(number, "", {}, text, " ".join(str(error).split()))
    return ToolCall(number, name, arguments, text)


def _read_pairs(text: str, quote: str) -> tuple[str, dict[str, Any]]:
    """Read `NAME{KEY:VALUE,...}`, in which objects and lists are written as in JSON and keys bare."""
    reader = _Values(text, quote)
    name = reader.until("{").strip()
    if not name:
        raise ValueError("the call names no tool")
    arguments = reader.members(0)
    reader.expect_end()
    return name, arguments


def _read_json(text: str, quote: str) -> tuple[str, dict[str, Any]]:
    """Read a JSON object with a `name` and `arguments`, or a list of one such object."""
    del quote
    reader = _Values(text)
    call = reader.value(0)
    reader.expect_end()
    if isinstance(call, list) and len(call) == 1:
        call = call[0]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("expected an object with a name and arguments")
    arguments: Any = next((call[key] for key in JSON_ARGUMENTS if key in call), {})
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments are {arguments!r:.40}, expected an object")
    return call["name"], arguments


_SYNTAXES: dict[str, Callable[[str, str], tuple[str, dict[str, Any]]]] = {PAIRS: _read_pairs, JSON: _read_json}


class _Values:
    """Reads values from a text, from left to right: of JSON, or with a quote also texts in quotes and bare keys."""

    def __init__(self, text: str, quote: str | None = None) -> None:
        self._text, self._quote, self._is_json, self._at = text, quote or "", quote is None, 0

    def until(self, end: str) -> str:
        """The text up to the next `end`, which is passed over."""
        found = self._text.find(end, self._at)
        if found < 0:
            raise ValueError(f"expected {end!r} after {self._rest()}")
        passed, self._at = self._text[self._at : found], found + len(end)
        return passed

    def members(self, depth: int) -> dict[str, Any]:
        """The members of an object whose opening brace was read."""
        return {self._key(): self.value(depth) for _ in self._items("}", depth)}

    def value(self, depth: int) -> Any:
        """The next value, inside so many others."""
        if self._quote and self._passes(self._quote):
            return self.until(self._quote)
        if self._passes("{"):
            return self.members(depth + 1)
        if self._passes("["):
            return [self.value(depth + 1) for _ in self._items("]", depth + 1)]
        if not self._is_json and self._passes("None"):  # as templates write it that know no `null`
            return None
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise ValueError(f"expected a value at {self._rest()}") from None
        return value

    def expect_end(self) -> None:
        if self._text[self._at :].strip():
            raise ValueError(f"{self._rest()} follows the call")

    def _items(self, end: str, depth: int) -> Iterator[None]:
        """Yield before each item of an object or a list, up to its end."""
        if depth > MAX_DEPTH:
            raise ValueError("values are nested too deeply")
        if self._passes(end):
            return
        while True:
            yield
            if self._passes(end):
                return
            if not self._passes(","):
                raise ValueError(f"expected ',' or {end!r} at {self._rest()}")

    def _key(self) -> str:
        if self._is_json:
            self._passes("")
            if not self._text.startswith('"', self._at):  # a value of another kind could be nested without end
                raise ValueError(f"expected a key at {self._rest()}")
            key = str(self.value(0))
        elif self._quote and self._passes(self._quote):
            key = self.until(self._quote)
        else:
            return self.until(":").strip()
        if not self._passes(":"):
            raise ValueError(f"expected ':' at {self._rest()}")
        return key

    def _passes(self, sign: str) -> bool:
        """Pass over whitespace, and over a sign if it follows."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        if found := self._text.startswith(sign, self._at):
            self._at += len(sign)
        return found

    def _rest(self) -> str:
        return f"{self._text[self._at :]!r:.40}"
