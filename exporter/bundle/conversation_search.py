"""Derive forms of conversations from a chat template, by rendering it and comparing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, pairwise

from exporter.bundle.chat_format import Render, hidden_markers, shown_content, texts_around
from exporter.bundle.conversation_form import (
    AFTER,
    ANSWER,
    ASK,
    ASSISTANT,
    BEFORE,
    BEGIN,
    BESIDE,
    CALL,
    SYSTEM,
    THOUGHT,
    TOOL,
    USER,
    Call,
    ConversationForm,
)
from exporter.bundle.conversation_probes import (
    PLAIN,
    PROBE,
    QUESTION,
    Order,
    Scope,
    Turn,
    conversation,
    distinct,
    probes,
)
from runtime_ref.chat import ChatTemplate, Message, Tool
from runtime_ref.errors import InputError

CALLING, SPEAKING = Turn(content=False, calls=1), Turn(content=True, calls=1)
# A short conversation with each kind of body: its turns, whether it has a system message, and the body's message.
SHOWN: Mapping[str, tuple[Order, bool, int]] = {
    SYSTEM: ((QUESTION,), True, 0),
    USER: ((QUESTION,), False, 0),
    ANSWER: ((QUESTION, PLAIN, QUESTION), False, 1),
    TOOL: ((QUESTION, CALLING), False, 2),
    BESIDE: ((QUESTION, SPEAKING), False, 1),
}


def conversation_forms(
    template: ChatTemplate,
    tools: Sequence[Tool],
    marks: tuple[str, str] | None,
    markers: Sequence[str],
    words: Sequence[str],
) -> list[ConversationForm]:
    """Return forms that give a template's prompts, as far as there are any.

    Args:
        template: the chat template.
        tools: what the model may call; forms are for prompts that offer all of these, and for prompts that offer none.
        marks: texts of the tokens between which calls are written; None if there are none.
        markers: texts that the template may treat in a special way, wherever they are.
        words: texts that it may look for.
    """
    forms: list[ConversationForm] = []
    has_switch = _has_switch(template)
    if not (marks or has_switch):  # messages are all there is, and `chat` is for these
        return []
    for offered in (False, True) if tools else (False,):
        for thinking in (None, True, False) if has_switch else (None,):
            render = partial(template.render, tools=list(tools) if offered else None, thinking=thinking)
            found = _Search(render, marks, tuple(markers), tuple(words)).find(offered)
            if found is None:
                continue
            found = replace(found, tools=offered)
            for i, form in enumerate(forms):
                if replace(form, thinking=()) == found:
                    forms[i] = replace(form, thinking=(*form.thinking, thinking))
                    break
            else:
                forms.append(replace(found, thinking=(thinking,)))
    return forms


def _has_switch(template: ChatTemplate) -> bool:
    """Whether a template has `enable_thinking`."""
    messages = conversation((QUESTION,), False, distinct())
    try:
        return template.render(messages, thinking=True) != template.render(messages, thinking=False)
    except InputError:
        return False


def _has_blanks(form: ConversationForm, messages: Sequence[Message]) -> bool:
    """Whether nothing is left of the content of a message with calls."""
    contents = (message["content"] for message in messages if message.get("tool_calls"))
    return any(content and not shown_content(content, form.hidden).strip() for content in contents)


@dataclass
class _Search:
    """Looks for a form of a template's prompts, with or without tools and thinking.

    Attributes:
        render: the template.
        marks: as for `conversation_forms`.
        markers: as for `conversation_forms`.
        words: as for `conversation_forms`.
        texts: of calls between their marks, by the calls.
    """

    render: Render
    marks: tuple[str, str] | None
    markers: tuple[str, ...]
    words: tuple[str, ...]
    texts: dict[str, str] = field(default_factory=dict)

    def find(self, offered: bool) -> ConversationForm | None:
        """Return the first form that gives the template's prompt for every probe; None if no form does.

        Args:
            offered: whether tools are offered, so that a form without calls is of no use.
        """
        try:
            form = replace(self._without_texts(), hidden=hidden_markers(self.render, self.markers))
        except (InputError, ValueError):
            return None
        calls = self.marks is not None and self._fate(TOOL) is not None
        systems = (False, True) if self._fate(SYSTEM) is not None else (False,)
        ways = [(form.beside, True), (form.beside, False), ("", True)] if form.beside else [("", True)]
        candidates = [(True, *way) for way in ways] if calls else []
        if not offered:
            candidates.append((False, "", True))
        for has_calls, beside, blanks in candidates:
            for alternate in (False, True):
                scope = Scope(has_calls, bool(beside), alternate)
                thoughts = tuple(kind for kind in form.thoughts if beside or kind != BESIDE)
                candidate = replace(form, beside=beside, thoughts=thoughts, blanks=blanks)
                found = self._with_texts(candidate, scope, systems)
                if found is None:
                    continue
                tried = probes(scope, systems, form.hidden or (), self.markers, self.words)
                if all(self._same(found, messages) for messages in tried if blanks or not _has_blanks(found, messages)):
                    return found
                break  # contents make the difference, in whatever order messages are
        return None

    def _without_texts(self) -> ConversationForm:
        """Return a form that has no `between` and no `hidden` yet.

        Raises:
            InputError: the template refuses a call.
            ValueError: a call has no marks around it.
        """
        trims = {kind: self._fate(kind) for kind in SHOWN if self.marks or kind not in (TOOL, BESIDE)}
        names, beside = False, ""
        if trims.get(TOOL) is not None:
            messages = conversation((QUESTION, SPEAKING), False, distinct())
            call, prompt = messages[1]["tool_calls"][0], self.render(messages)
            after = prompt.partition(self.written(call))[2]
            names = call["function"]["name"] in after
            if messages[1]["content"] in prompt:
                beside = AFTER if messages[1]["content"] in after else BEFORE
        turns = {ANSWER: PLAIN, CALL: CALLING, **({BESIDE: SPEAKING} if beside == BEFORE else {})}
        thoughts = {kind: self._fate(THOUGHT, replace(turn, thought=True)) for kind, turn in turns.items()}
        trims[THOUGHT] = any(thoughts.values())
        repeated = tuple(kind for kind, trimmed in thoughts.items() if trimmed is not None)
        trim = tuple(kind for kind, trimmed in trims.items() if trimmed and kind != BESIDE)
        return ConversationForm(False, (), {}, trim, None, repeated, names, beside)

    def _fate(self, kind: str, turn: Turn = PLAIN) -> bool | None:
        """Whether bodies of a kind are trimmed; None if the template leaves them out or refuses them.

        Args:
            kind: a key of `SHOWN`, or a thought.
            turn: that of the thought.
        """
        order, system, i = SHOWN.get(kind, ((QUESTION, turn), False, 1))
        number = count()
        messages = conversation(order, system, lambda: f" \n {PROBE}{next(number)}. \n ")
        body = messages[i]["reasoning_content" if kind == THOUGHT else "content"]
        try:
            prompt = self.render(messages)
        except InputError:
            return None
        return None if body.strip() not in prompt else body not in prompt

    def _with_texts(self, form: ConversationForm, scope: Scope, systems: Sequence[bool]) -> ConversationForm | None:
        """Return a form with the texts between bodies; None if these do not depend on the two kinds alone."""
        between: dict[str, dict[str, str]] = {}
        refused = []
        for order in scope.orders():
            for system in systems:
                messages = conversation(order, system, distinct())
                try:
                    prompt = self.render(messages)
                except InputError:
                    refused.append(messages)
                    continue
                try:
                    kinds, bodies = zip(*form.bodies(messages, self.written), strict=True)
                    texts = texts_around(prompt, bodies)
                except (InputError, ValueError):
                    return None
                for (previous, kind), text in zip(pairwise((BEGIN, *kinds, ASK)), texts, strict=True):
                    if between.setdefault(previous, {}).setdefault(kind, text) != text:
                        return None
        form = replace(form, between=between)
        return form if all(self._same(form, messages) for messages in refused) else None

    def _same(self, form: ConversationForm, messages: Sequence[Message]) -> bool:
        """Whether form and template give the same prompt, or both refuse the messages."""
        try:
            expected: str | None = self.render(messages)
        except InputError:
            expected = None
        try:
            return form.render(messages, self.written) == expected
        except InputError:
            return False
        except ValueError:
            return expected is None

    def written(self, call: Call) -> str:
        """Return the text of a call between its marks.

        Raises:
            InputError: the template refuses the call.
            ValueError: it does not write it between marks.
        """
        key = json.dumps(call)
        if key not in self.texts:
            question = distinct()()
            messages: list[Message] = [
                {"role": USER, "content": question},
                {"role": ASSISTANT, "content": "", "tool_calls": [call]},
                {"role": TOOL, "name": call["function"]["name"], "content": "Result.", "tool_call_id": call["id"]},
            ]
            begin, end = self.marks or ("", "")
            rest = self.render(messages).partition(question)[2]
            inside, ended, _ = rest.partition(begin)[2].partition(end) if begin else ("", "", "")
            if not ended:
                raise ValueError("a call has no marks around it")
            self.texts[key] = inside
        return self.texts[key]
