"""Conversations by which a form is derived from a chat template, and for which it must give the template's prompts."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product, repeat
from typing import Any

from exporter.bundle.chat_format import PROBE_CONTENTS
from exporter.bundle.conversation_form import ASSISTANT, SYSTEM, TOOL, USER
from runtime_ref.chat import Message

NUM_RANDOM_PROBES = 200
PROBE = "Qzx-content-"  # tools' descriptions may have likelier texts
JSON_TEXTS = ("[1, 2]", '{"a": 1}', "5", "-0.5", "null", "true", '"x"', "[", "{")
CALL_ID = "{:09d}"  # some templates ask for nine characters
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"place": "Bern", "days": 3},
    {"none": None, "true": True, "less": -2.5, "texts": ["a", "é中"], "object": {"inner": {"x": [1, {}]}}},
)


@dataclass(frozen=True)
class Turn:
    """What an assistant's message has.

    Attributes:
        content: whether it has content.
        calls: how many tools it calls; each is answered.
        thought: whether it has a thought.
    """

    content: bool = True
    calls: int = 0
    thought: bool = False


QUESTION, PLAIN = None, Turn()  # None stands for the user's message
Order = tuple[Turn | None, ...]


@dataclass(frozen=True)
class Scope:
    """Which conversations a form is for.

    Attributes:
        calls: whether tools are called.
        beside: whether messages with calls may have content.
        alternate: whether user and assistant take turns: the user begins, the assistant calls tools any number of times
            and answers, and the user asks again.
    """

    calls: bool
    beside: bool
    alternate: bool

    def turns(self) -> tuple[Turn, ...]:
        """Return what an assistant's message can have."""
        contents = (False, True) if self.beside else (False,)
        calling = (Turn(*parts) for parts in product(contents, (1, 2), (False, True)))
        return (PLAIN, Turn(thought=True), *(calling if self.calls else ()))

    def orders(self) -> list[Order]:
        """Return all orders of up to three turns, of which one may be the last; or with `alternate` of up to four."""
        grown: list[Order] = [(QUESTION,)] if self.alternate else [(QUESTION,), (PLAIN,)]
        found: list[Order] = []
        for _ in range(4 if self.alternate else 3):
            found += [order for order in grown if not self.alternate or order[-1] is QUESTION or order[-1].calls]
            grown = [(*order, turn) for order in grown for turn in self._after(order[-1])]
        return found

    def _after(self, last: Turn | None) -> tuple[Turn | None, ...]:
        if not self.alternate:
            return (QUESTION, *self.turns())
        return self.turns() if last is QUESTION or last.calls else (QUESTION,)


def conversation(order: Order, system: bool, text: Callable[[], str]) -> list[Message]:
    """Return a conversation, whose calls differ.

    Args:
        order: its turns.
        system: whether it begins with a system message.
        text: gives the contents, one after another.
    """
    messages: list[Message] = [{"role": SYSTEM, "content": text()}] if system else []
    number = count(1)
    for turn in order:
        if turn is QUESTION:
            messages.append({"role": USER, "content": text()})
            continue
        thought = {"reasoning_content": text()} if turn.thought else {}
        made = [_call(next(number)) for _ in range(turn.calls)]
        calls = {"tool_calls": made} if made else {}
        messages.append({"role": ASSISTANT, "content": text() if turn.content else "", **thought, **calls})
        for call in made:
            name, of_call = call["function"]["name"], {"tool_call_id": call["id"]}
            messages.append({"role": TOOL, "name": name, "content": text(), **of_call})
    return messages


def _call(number: int) -> dict[str, Any]:
    """A call of a tool, which differs from those with other numbers."""
    arguments = ARGUMENTS[number % len(ARGUMENTS)]
    return {
        "id": CALL_ID.format(number),
        "type": "function",
        "function": {"name": f"probe_{number}_name", "arguments": arguments},
    }


def distinct() -> Callable[[], str]:
    """Return what gives contents that are nowhere else in a prompt."""
    number = count()
    return lambda: f"{PROBE}{next(number)}."


def probes(
    scope: Scope, systems: Sequence[bool], pieces: Sequence[str], markers: Sequence[str], words: Sequence[str]
) -> Iterator[list[Message]]:
    """Yield conversations that most likely show a difference, with odd contents; then random ones.

    Args:
        scope: which conversations the form is for.
        systems: whether there is a system message: True, False or both.
        pieces: what random contents have more often than others.
        markers: texts that the template may treat in a special way, wherever they are.
        words: texts that it may look for.
    """
    order: Order = (QUESTION, PLAIN, QUESTION)
    last: Order = ()
    if scope.calls:
        first, second, third = Turn(scope.beside, 1, True), Turn(scope.beside, 3, True), Turn(scope.beside, 1)
        order, last = (QUESTION, first, PLAIN, QUESTION), (second, third)
    marked = [text for marker in markers for text in (marker, f"a{marker}b", f" {marker}\n")]
    for content in (*PROBE_CONTENTS, *JSON_TEXTS, *marked):
        for system in systems:
            yield conversation((*order, *last), system, repeat(content).__next__)
    for content in (text for word in words for text in (word, f"a {word} b")):
        for turns in (order, (*order, *last)):
            yield conversation(turns, systems[-1], repeat(content).__next__)
    generator = random.Random(0)
    more = ["a", "b", " ", "\n", "\u3000", *list(pieces) * 6, *generator.sample(markers, min(len(markers), 8))]
    choices = scope.orders()

    def random_text() -> str:
        return "".join(generator.choices(more, k=generator.randrange(9)))

    for _ in range(NUM_RANDOM_PROBES):
        order = generator.choice(choices)
        if not scope.alternate or order[-1] is QUESTION:
            order = (*order[:-1], *generator.choice(choices))
        yield conversation(order, generator.choice(systems), random_text)
