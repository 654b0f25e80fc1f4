"""Derive from a chat template a description of its prompts that needs no Jinja. FORMAT.md, "Chat", specifies it."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from runtime_ref.acceptance import common_prefix
from runtime_ref.chat import Message
from runtime_ref.errors import InputError

Render = Callable[[Sequence[Message]], str]
Roles = tuple[str, ...]

WHITESPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
# Contents with whitespace inside and around, with invisible characters that are not whitespace, and with text that
# Jinja or HTML would interpret.
PROBE_CONTENTS = (
    *("{{ bos_token }}", "{% raw %}", "{# #}", "<b>&amp;\"'\\n", "user", "system", "e\u0301", "中文👩‍💻", "x" * 3000),
    *("", " ", "\n", "x", "  x\n", f"{WHITESPACE}x{WHITESPACE}"),
    *("\u200bx\ufeff", "\u180ex\u2060", "a  b\n\n c", "\r\nx\r\n"),
)
NUM_RANDOM_PROBES = 200


@dataclass(frozen=True)
class ChatFormat:
    """How messages become a prompt: the manifest's `chat`.

    Attributes:
        begin: text before the first message.
        turns: by role, the text before and the text after the content.
        answer: text after the last message.
        trim: whether contents are trimmed.
        alternate: whether the format holds only for chats in which user and assistant take turns.
        hidden: the two markers between which text is dropped from an assistant's content; None if nothing is dropped.
    """

    begin: str
    turns: Mapping[str, tuple[str, str]]
    answer: str
    trim: bool
    alternate: bool
    hidden: tuple[str, str] | None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the answer to the last message.

        Args:
            messages: a chat whose roles are in `turns` and which alternates if `alternate` asks for it.
        """
        texts = [self.begin]
        for message in messages:
            before, after = self.turns[message["role"]]
            texts += [before, self._content(message), after]
        return "".join([*texts, self.answer])

    def _content(self, message: Message) -> str:
        content = message["content"]
        if message["role"] == "assistant":
            content = shown_content(content, self.hidden)
        return content.strip() if self.trim else content


def shown_content(content: str, hidden: tuple[str, str] | None) -> str:
    """Return what an assistant's content repeats to the model.

    Args:
        content: of the message.
        hidden: the two markers between which text is dropped; None if nothing is dropped.
    """
    if hidden is None:
        return content
    begin, end = hidden
    return "".join(part.split(begin)[0] for part in content.split(end))


def find_chat_format(render: Render, markers: Sequence[str], words: Sequence[str]) -> ChatFormat | None:
    """Return the first format that gives the template's prompt for every probe; None if no format does.

    Args:
        render: the template: it returns the prompt for messages, or raises InputError for messages that it refuses.
        markers: texts that the template may treat in a special way, wherever they are.
        words: texts that it may look for.
    """
    try:
        full = _turns(render)
        hidden = hidden_markers(render, markers)
    except (InputError, ValueError):
        return None
    no_system = {role: turn for role, turn in full.turns.items() if role != "system"}
    for turns in (full.turns, no_system) if "system" in full.turns else (no_system,):
        for alternate in (False, True):
            for trim in (True, False):
                candidate = replace(full, turns=turns, alternate=alternate, trim=trim, hidden=hidden)
                if all(_same_prompt(render, candidate, messages) for messages in probes(candidate, markers, words)):
                    return candidate
    return None


def probes(candidate: ChatFormat, markers: Sequence[str], words: Sequence[str]) -> Iterator[list[Message]]:
    """Yield chats for which a format must give the template's prompt; those that most likely fail come first.

    Args:
        candidate: the format to compare with the template.
        markers: as for `find_chat_format`.
        words: as for `find_chat_format`.
    """
    for roles in _role_orders(candidate):
        yield [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    systems: tuple[Roles, ...] = ((), ("system",)) if "system" in candidate.turns else ((),)
    marked = [text for marker in markers for text in (marker, f"a{marker}b", f" {marker}\n")]
    for content in (*PROBE_CONTENTS, *marked, *(text for word in words for text in (word, f"a {word} b"))):
        for start in systems:
            yield [{"role": role, "content": content} for role in (*start, "user", "assistant", "user")]
    generator = random.Random(0)
    frequent = list(candidate.hidden or ()) * 6
    pieces = ["a", "b", " ", "\n", "\u3000", *frequent, *generator.sample(markers, min(len(markers), 8))]
    for _ in range(NUM_RANDOM_PROBES):
        start, pairs = generator.choice(systems), generator.randrange(4)
        yield [
            {"role": role, "content": "".join(generator.choices(pieces, k=generator.randrange(9)))}
            for role in (*start, *("user", "assistant") * pairs, "user")
        ]


def _role_orders(candidate: ChatFormat) -> Iterator[Roles]:
    """Yield all orders of up to four messages, or with `alternate` the alternating ones of up to nine messages."""
    if candidate.alternate:
        orders: list[Roles] = [("user", *("assistant", "user") * pairs) for pairs in range(5)]
    else:
        orders = [()]
        for length in range(4):
            orders += [(*order, role) for order in orders if len(order) == length for role in ("user", "assistant")]
    for order in orders:
        if order:
            yield order
        if "system" in candidate.turns:
            yield ("system", *order)


def _same_prompt(render: Render, candidate: ChatFormat, messages: Sequence[Message]) -> bool:
    try:
        return render(messages) == candidate.render(messages)
    except InputError:
        return False


def _turns(render: Render) -> ChatFormat:
    """Return a format with the texts around contents; its `trim`, `alternate` and `hidden` are not determined yet.

    Raises:
        InputError: the template refuses a user's message, or an answer to it.
        ValueError: the prompt does not have each content exactly once, in order.
    """
    # `to_user` is the text between an assistant's content and the user's after it, `to_assistant` the reverse.
    first, last = _texts_around(render, ("user",))
    _, to_assistant, to_user, _ = _texts_around(render, ("user", "assistant", "user"))
    user_start = _common_end(first, to_user)
    begin, assistant_end = first.removesuffix(user_start), to_user.removesuffix(user_start)
    # Most templates end the turns of both roles with the same text.
    same_end = to_assistant.startswith(assistant_end) and last.startswith(assistant_end)
    user_end = assistant_end if same_end else _common_start(to_assistant, last)
    turns = {"user": (user_start, user_end), "assistant": (to_assistant.removeprefix(user_end), assistant_end)}
    try:
        first, to_user, _ = _texts_around(render, ("system", "user"))
        if first.startswith(begin) and to_user.endswith(user_start):
            turns = {"system": (first.removeprefix(begin), to_user.removesuffix(user_start)), **turns}
    except (InputError, ValueError):
        pass  # the template has no system messages
    return ChatFormat(begin, turns, last.removeprefix(user_end), trim=False, alternate=True, hidden=None)


def hidden_markers(render: Render, markers: Sequence[str]) -> tuple[str, str] | None:
    """Return the first pair of markers between which text is dropped from an assistant's content; None if none is.

    Args:
        render: as for `find_chat_format`.
        markers: as for `find_chat_format`.

    Raises:
        InputError: the template refuses an answer between two questions.
        ValueError: the prompt does not have each content exactly once, in order.
    """
    first, to_assistant, to_user, last = _texts_around(render, ("user", "assistant", "user"))
    before, after = f"{first}0{to_assistant}", f"{to_user}2{last}"

    def remaining(content: str) -> str:
        roles = (("user", "0"), ("assistant", content), ("user", "2"))
        prompt = render([{"role": role, "content": text} for role, text in roles])
        return prompt.removeprefix(before).removesuffix(after)

    for begin in markers:
        if remaining(f"a{begin}b") == "a":
            for end in markers:
                if remaining(f"a{begin}b{end}c") == "ac":
                    return begin, end
    return None


def _texts_around(render: Render, roles: Roles) -> list[str]:
    """Return the texts before, between and after the contents of a chat with these roles."""
    contents = [f"Content{i}." for i in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return texts_around(render(messages), contents)


def texts_around(text: str, contents: Sequence[str]) -> list[str]:
    """Return the texts before, between and after contents.

    Args:
        text: a prompt.
        contents: that it should have, in order.

    Raises:
        ValueError: the prompt does not have each of them exactly once, in order.
    """
    texts = []
    for content in contents:
        before, match, text = text.partition(content)
        if not match or content in text:
            raise ValueError(f"the prompt does not have {content!r} exactly once")
        texts.append(before)
    return [*texts, text]


def _common_start(first: str, second: str) -> str:
    return first[: common_prefix(first, second)]


def _common_end(first: str, second: str) -> str:
    return _common_start(first[::-1], second[::-1])[::-1]
