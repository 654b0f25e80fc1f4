"""Prompts of whole conversations without Jinja. FORMAT.md, "Conversations", specifies them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.bundle.chat_format import shown_content
from runtime_ref.chat import Message

# What a prompt is made of, besides the text between: its two ends, and the kinds of bodies.
BEGIN, ASK = "begin", "ask"
SYSTEM, USER, TOOL, ASSISTANT = "system", "user", "tool", "assistant"
THOUGHT, ANSWER, CALL, NAME, BESIDE = "thought", "answer", "call", "name", "beside"
BEFORE, AFTER = "before", "after"

Call = Mapping[str, Any]
Written = Callable[[Call], str]


@dataclass(frozen=True)
class ConversationForm:
    """How conversations become prompts: one of the manifest's `conversations`.

    Attributes:
        tools: whether the prompt offers the manifest's `tools`.
        thinking: for which values of `enable_thinking` the form holds; None where nothing is said.
        between: by the kind of a body, or `begin`, and the kind of the next one, or `ask`, the text between them.
        trim: kinds of bodies that are trimmed.
        hidden: the two markers between which text is dropped from an assistant's content; None if nothing is dropped.
        thoughts: kinds of bodies before which a thought is repeated, after the last message of the user.
        names: whether the tool's name comes ahead of its answer.
        beside: where the content of a message with calls goes: `before` the calls or `after` their answers; empty if
            such a message has no content.
        blanks: whether content beside calls of which nothing is left counts as none; otherwise it has no place.
    """

    tools: bool
    thinking: tuple[bool | None, ...]
    between: Mapping[str, Mapping[str, str]]
    trim: tuple[str, ...] = ()
    hidden: tuple[str, str] | None = None
    thoughts: tuple[str, ...] = ()
    names: bool = False
    beside: str = ""
    blanks: bool = True

    def render(self, messages: Sequence[Message], written: Written) -> str:
        """Return the prompt for the answer to the last message.

        Args:
            messages: a conversation as chat templates know it, in which each call is answered.
            written: gives the text of a call between its marks.

        Raises:
            ValueError: the form has no place for one of the messages.
        """
        texts, previous = [], BEGIN
        for kind, body in (*self.bodies(messages, written), (ASK, "")):
            if kind not in self.between.get(previous, {}):
                raise ValueError(f"{kind} cannot follow {previous}")
            texts += [self.between[previous][kind], body]
            previous = kind
        return "".join(texts)

    def bodies(self, messages: Sequence[Message], written: Written) -> Iterator[tuple[str, str]]:
        """Yield the bodies of a conversation in the order of its prompt, each with its kind.

        Args:
            messages: as for `render`.
            written: as for `render`.

        Raises:
            ValueError: a message has another role, an answer of a tool has no name, a message with calls has content
                that has no place, or calls have no answers or too many.
        """
        asked = max((i for i, message in enumerate(messages) if message["role"] == USER), default=-1)
        kept = ""  # content that comes after the answers to its message's calls
        unanswered = 0
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role not in (SYSTEM, USER, ASSISTANT, TOOL):
                raise ValueError(f"{role} is no role")
            if (unanswered > 0) != (role == TOOL):
                raise ValueError(f"calls without an answer before a message of {role}: {unanswered}")
            if role == TOOL:
                if self.names and not message.get("name"):
                    raise ValueError("an answer of a tool has no name")
                if self.names:
                    yield NAME, message["name"]
                yield TOOL, self._trimmed(TOOL, content)
                unanswered -= 1
                continue
            if kept:
                yield BESIDE, kept
            kept = ""
            if role != ASSISTANT:
                yield role, self._trimmed(role, content)
                continue
            body, calls = self._trimmed(ANSWER, shown_content(content, self.hidden)), message.get("tool_calls", ())
            if calls and content and not (self.beside and (body or self.blanks)):
                raise ValueError("content beside calls has no place")
            unanswered = len(calls)
            first = ANSWER if not calls else BESIDE if body and self.beside == BEFORE else CALL
            if (thought := message.get("reasoning_content")) and i > asked and first in self.thoughts:
                yield THOUGHT, self._trimmed(THOUGHT, thought)
            if first != CALL:
                yield first, body
            yield from ((CALL, written(call)) for call in calls)
            if calls and self.beside == AFTER:
                kept = body
        if unanswered:
            raise ValueError(f"calls without an answer: {unanswered}")
        if kept:
            yield BESIDE, kept

    def _trimmed(self, kind: str, text: str) -> str:
        return text.strip() if kind in self.trim else text
