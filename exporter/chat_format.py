"""The plain form of a chat template, for devices that have no Jinja. FORMAT.md, "Chat", has the rule."""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.generation import SpecialTokens
from runtime_ref.chat import CHAT_TEMPLATE, ChatTemplate, Message
from runtime_ref.errors import InputError
from runtime_ref.tokenizer import TextTokenizer

Render = Callable[[Sequence[Message]], str]
Roles = tuple[str, ...]

# What may stand in a template for more than itself: `<|channel>`, `</s>`.
MARKER = re.compile(r"<[^<>\s]{1,40}>")
BLANKS = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
# Blanks inside and around, characters that only look blank, what other template languages would take for code.
CONTENTS = (
    *("{{ bos_token }}", "{% raw %}", "{# #}", "<b>&amp;\"'\\n", "user", "system", "e\u0301", "中文👩‍💻", "x" * 3000),
    *("", " ", "\n", "x", "  x\n", f"{BLANKS}x{BLANKS}", "\u200bx\ufeff", "\u180ex\u2060", "a  b\n\n c", "\r\nx\r\n"),
)
RANDOM_CHATS = 200


@dataclass(frozen=True)
class ChatFormat:
    """What stands before and after each role's content, and what becomes of contents.

    `alternate` if only chats in which user and assistant take turns have this form; `hidden` are the marks that begin
    and end what is dropped from an assistant's content, if anything is.
    """

    begin: str
    turns: Mapping[str, tuple[str, str]]
    answer: str
    trim: bool
    alternate: bool
    hidden: tuple[str, str] | None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the answer to the last of the messages, which must suit the format."""
        texts = [self.begin]
        for message in messages:
            before, after = self.turns[message["role"]]
            texts += [before, self._content(message), after]
        return "".join([*texts, self.answer])

    def _content(self, message: Message) -> str:
        content = message["content"]
        if self.hidden and message["role"] == "assistant":
            begin, end = self.hidden
            content = "".join(part.split(begin)[0] for part in content.split(end))
        return content.strip() if self.trim else content


def chat_format(bundle: Path, tokens: SpecialTokens) -> ChatFormat | None:
    """The form of a bundle's template; None if there is none, or no tokenizer that can be read.

    Raises:
        InputError: the template cannot be read.
    """
    if not (bundle / CHAT_TEMPLATE).exists():
        return None
    try:
        tokenizer = TextTokenizer(bundle, tokens)
    except InputError:  # the bundle runs on token ids alone
        return None
    source = (bundle / CHAT_TEMPLATE).read_text(encoding="utf-8")
    if "strftime_now" in source:  # another prompt each day
        return None
    markers = dict.fromkeys([*MARKER.findall(source), *tokenizer.special_tokens.values()])
    return plain_form(ChatTemplate(bundle, tokenizer).render, tuple(markers))


def plain_form(render: Render, markers: Sequence[str]) -> ChatFormat | None:
    """The first form that gives the same prompt as the template does for each of the probes; None if none does.

    Args:
        render: the template; it raises InputError for messages that it refuses.
        markers: texts that the template may treat unlike others.
    """
    try:
        full = _turns(render)
        hidden = _hidden(render, markers)
    except (InputError, ValueError):
        return None
    without = {role: turn for role, turn in full.turns.items() if role != "system"}
    for turns in (full.turns, without) if "system" in full.turns else (without,):
        for alternate in (False, True):
            for trim in (True, False):
                form = replace(full, turns=turns, alternate=alternate, trim=trim, hidden=hidden)
                if all(_same(render, form, messages) for messages in probes(form, markers)):
                    return form
    return None


def probes(form: ChatFormat, markers: Sequence[str]) -> Iterator[list[Message]]:
    """Chats that a form must render as the template does; those most likely to tell come first."""
    for roles in _role_orders(form):
        yield [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    systems: tuple[Roles, ...] = ((), ("system",)) if "system" in form.turns else ((),)
    marked = [text for marker in markers for text in (marker, f"a{marker}b", f" {marker}\n")]
    for content in (*CONTENTS, *marked):
        for start in systems:
            yield [{"role": role, "content": content} for role in (*start, "user", "assistant", "user")]
    generator = random.Random(0)
    often = list(form.hidden or ()) * 6
    pieces = ["a", "b", " ", "\n", "\u3000", *often, *generator.sample(markers, min(len(markers), 8))]
    for _ in range(RANDOM_CHATS):
        start, pairs = generator.choice(systems), generator.randrange(4)
        yield [
            {"role": role, "content": "".join(generator.choices(pieces, k=generator.randrange(9)))}
            for role in (*start, *("user", "assistant") * pairs, "user")
        ]


def _role_orders(form: ChatFormat) -> Iterator[Roles]:
    """Without `alternate` every order of up to four messages, else turns taken up to nine."""
    if form.alternate:
        orders: list[Roles] = [("user", *("assistant", "user") * pairs) for pairs in range(5)]
    else:
        orders = [()]
        for length in range(4):
            orders += [(*order, role) for order in orders if len(order) == length for role in ("user", "assistant")]
    for order in orders:
        if order:
            yield order
        if "system" in form.turns:
            yield ("system", *order)


def _same(render: Render, form: ChatFormat, messages: Sequence[Message]) -> bool:
    try:
        return render(messages) == form.render(messages)
    except InputError:
        return False


def _turns(render: Render) -> ChatFormat:
    """What stands between contents, shared out so that it fits; of contents themselves nothing is known yet.

    Raises:
        InputError: the template refuses a user's message, or its answer.
        ValueError: it does not write contents one after another.
    """
    first, last = _around(render, ("user",))
    _, to_assistant, to_user, _ = _around(render, ("user", "assistant", "user"))
    user = _common_end(first, to_user)
    begin, closed = first.removesuffix(user), to_user.removesuffix(user)
    # A turn of either role most likely ends alike.
    alike = to_assistant.startswith(closed) and last.startswith(closed)
    asked = closed if alike else _common_start(to_assistant, last)
    turns = {"user": (user, asked), "assistant": (to_assistant.removeprefix(asked), closed)}
    try:
        first, to_user, _ = _around(render, ("system", "user"))
        if first.startswith(begin) and to_user.endswith(user):
            turns = {"system": (first.removeprefix(begin), to_user.removesuffix(user)), **turns}
    except (InputError, ValueError):
        pass  # a chat has no system message then
    return ChatFormat(begin, turns, last.removeprefix(asked), trim=False, alternate=True, hidden=None)


def _hidden(render: Render, markers: Sequence[str]) -> tuple[str, str] | None:
    """The first two markers between which an assistant's content is dropped."""
    first, to_assistant, to_user, last = _around(render, ("user", "assistant", "user"))
    before, after = f"{first}0{to_assistant}", f"{to_user}2{last}"

    def left(content: str) -> str:
        roles = (("user", "0"), ("assistant", content), ("user", "2"))
        found = render([{"role": role, "content": text} for role, text in roles])
        return found.removeprefix(before).removesuffix(after)

    for begin in markers:
        if left(f"a{begin}b") == "a":
            for end in markers:
                if left(f"a{begin}b{end}c") == "ac":
                    return begin, end
    return None


def _around(render: Render, roles: Roles) -> list[str]:
    """The texts around contents."""
    contents = [f"Content{i}." for i in range(len(roles))]
    text = render([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
    around = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            raise ValueError(f"{content} is not there once")
        around.append(before)
    return [*around, text]


def _common_start(one: str, other: str) -> str:
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]
