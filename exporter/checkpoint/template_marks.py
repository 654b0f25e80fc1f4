"""What a chat template tells about an answer: the token that ends it, and the tokens around thoughts."""

import re
from collections.abc import Mapping, Sequence

from runtime_ref.chat import ChatTemplate, Message
from runtime_ref.errors import InputError

# Texts that a template may treat in a special way, such as `<|channel>` and `</s>`.
MARKER = re.compile(r"<[^<>\s]{1,40}>")


def template_markers(source: str) -> list[str]:
    """Return the texts in a template's source that look like marks, in the order in which they first occur."""
    return list(dict.fromkeys(MARKER.findall(source)))


def template_words(source: str) -> list[str]:
    """Return the texts that a template has between quotes, in the order in which they first occur."""
    quoted = re.findall(r"""'((?:[^'\\\n]|\\.)*)'|"((?:[^"\\\n]|\\.)*)\"""", source)
    return list(dict.fromkeys((one or other).replace("\\n", "\n") for one, other in quoted if one or other))


def end_of_turn(template: ChatTemplate, added_tokens: Mapping[str, int]) -> int | None:
    """Return the token that a template writes after an answer; None if it writes none.

    Args:
        template: the chat template.
        added_tokens: ids of the tokenizer's added tokens, by text.
    """
    asked, begin = [("user", "Hi."), ("assistant", "Answer.")], ""
    text = _render(template, asked, ask=False)
    if text is None:  # it refuses chats that end with an answer: what follows one may begin the next turn
        text = _render(template, [*asked, ("user", "Bye.")], ask=False) or ""
        begin = text.partition("Hi.")[0]
    _, found, after = text.rpartition("Answer.")
    matching = [token for token in added_tokens if found and token and after.lstrip().startswith(token)]
    matching = [token for token in matching if token not in begin]
    return added_tokens[max(matching, key=len)] if matching else None


def thought_marks(template: ChatTemplate, added_tokens: Mapping[str, int]) -> tuple[str, str] | None:
    """Return the tokens that begin and end a thought: what an answer has between them is not repeated to the model.

    Args:
        template: the chat template.
        added_tokens: ids of the tokenizer's added tokens, by text.
    """

    def repeated(answer: str) -> str | None:
        return _render(template, [("user", "Hi."), ("assistant", answer), ("user", "Bye.")], ask=False)

    expected = repeated("Answer.")
    if expected is None or "Answer." not in expected:
        return None
    marks = [token for token in added_tokens if token and token in template.source]
    pairs = [
        (begin, end)
        for begin in marks
        for end in marks
        if begin != end and repeated(f"{begin}Thought.{end}Answer.") == expected
    ]
    # A template that keeps what follows the end mark takes any text for the begin mark: then names tell which it is.
    named = [pair for pair in pairs if _letters(pair[0]) == _letters(pair[1])]
    needed = [(begin, end) for begin, end in pairs if repeated(f"Thought.{end}Answer.") != expected]
    return next(iter((*named, *needed)), None)


def _letters(mark: str) -> str:
    return "".join(character for character in mark if character.isalpha())


def _render(template: ChatTemplate, turns: Sequence[tuple[str, str]], ask: bool) -> str | None:
    """The template's prompt for turns of (role, content); None if it refuses them."""
    return rendered(template, [{"role": role, "content": content} for role, content in turns], ask)


def rendered(template: ChatTemplate, messages: Sequence[Message], ask: bool) -> str | None:
    """Return the template's prompt for messages; None if it refuses them.

    Args:
        template: the chat template.
        messages: as for `ChatTemplate.render`.
        ask: as for `ChatTemplate.render`.
    """
    try:
        return template.render(messages, ask)
    except InputError:
        return None
