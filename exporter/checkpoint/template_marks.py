"""What a chat template tells about an answer: the token that ends it, and the tokens around thoughts."""

import re
from collections.abc import Mapping

from runtime_ref.chat import ChatTemplate, Message
from runtime_ref.errors import InputError

# Texts that a template may treat in a special way, such as `<|channel>` and `</s>`.
MARKER = re.compile(r"<[^<>\s]{1,40}>")


def template_markers(source: str) -> list[str]:
    """Return the texts in a template's source that look like marks, in the order in which they first occur."""
    return list(dict.fromkeys(MARKER.findall(source)))


def end_of_turn(template: ChatTemplate, added_tokens: Mapping[str, int]) -> int | None:
    """Return the token that a template writes after an answer; None if it writes none.

    Args:
        template: the chat template.
        added_tokens: ids of the tokenizer's added tokens, by text.
    """
    try:
        text = template.render([_message("user", "Hi."), _message("assistant", "Answer.")], ask=False)
    except InputError:
        return None
    after = text.rpartition("Answer.")[2].lstrip()
    matching = [text for text in added_tokens if text and after.startswith(text)]
    return added_tokens[max(matching, key=len)] if matching else None


def thought_marks(template: ChatTemplate, added_tokens: Mapping[str, int]) -> tuple[int, int] | None:
    """Return the tokens that begin and end a thought: what an answer has between them is not repeated to the model.

    Args:
        template: the chat template.
        added_tokens: ids of the tokenizer's added tokens, by text.
    """

    def repeated(answer: str) -> str | None:
        try:
            messages = [_message("user", "Hi."), _message("assistant", answer), _message("user", "Bye.")]
            return template.render(messages)
        except InputError:
            return None

    marks = [text for text in template_markers(template.source) if text in added_tokens]
    expected = repeated("Answer.")
    if expected is None or "Answer." not in expected:
        return None
    for begin in marks:
        for end in marks:
            if begin != end and repeated(f"{begin}Thought.{end}Answer.") == expected:
                return added_tokens[begin], added_tokens[end]
    return None


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
