"""Forms of conversations give the prompts of their template; templates for which that is impossible get none."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.bundle.conversation_form import ConversationForm
from exporter.bundle.plain_chat import PlainChat, plain_chat
from exporter.checkpoint.special_tokens import special_tokens
from runtime_ref.chat import ChatTemplate
from runtime_ref.errors import InputError
from tests.chats import SPEAKING, TALKING, TEMPLATE, WEATHER, save_talking
from tests.vectors.make_conversation import talk, written

TOOLS = [WEATHER, {"type": "function", "function": {"name": "none", "description": "Does <nothing> & 'no more'."}}]
ASSISTANT, CALL = "{%- if message.reasoning_content", "{{- '<|tool_call>call:'"
# Each is a change of `SPEAKING`, and what the form of its prompts then differs in.
VARIANTS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "as it is": (("", ""), {}),
    "tools named": (("response:{", "response:' ~ message.name ~ '{"), {"names": True}),
    "thoughts trimmed": (
        ("thought\\n' ~ message.reasoning_content", "thought\\n' ~ message.reasoning_content | trim"),
        {},
    ),
    "nothing is said beside calls": (("text if message.tool_calls", "'' if message.tool_calls"), {"beside": ""}),
    "blanks matter beside calls": (
        ("text if message.tool_calls", "text ~ ('!' if message.content else '') if message.tool_calls"),
        {"blanks": False},
    ),
    "messages of one role in a row are refused": (
        (
            ASSISTANT,
            "{{ raise_exception('again') if not loop.first and loop.previtem.role == message.role }}" + ASSISTANT,
        ),
        {},
    ),
    "messages of one role in a row are numbered": (
        (ASSISTANT, "{{ loop.index if not loop.first and loop.previtem.role == message.role }}" + ASSISTANT),
        {},
    ),
}
WITHOUT_FORM = {
    "a word counts": ("{%- if add_generation_prompt -%}", "{%- if '/quiet' not in messages[-1].content -%}"),
    "tools' answers in JSON are written as they are": (
        "value(message.content | trim)",
        "(message.content if message.content[:1] == '[' else value(message.content | trim))",
    ),
    "calls numbered": (CALL, "{{- loop.index }}" + CALL),
    "turns numbered": (ASSISTANT, "{{ loop.index }}" + ASSISTANT),
    "tools' answers in lower case": ("message.content | trim)", "message.content | lower)"),
    "thoughts of all turns": ("and loop.index0 > state.asked", ""),
    "dated": ("{{- bos_token -}}", "{{- bos_token ~ strftime_now('%Y') -}}"),
}


@pytest.fixture
def derive(tmp_path: Path) -> Callable[..., PlainChat]:
    """Return a function that derives the forms of a template."""

    def forms(template: str, tools: Any = TOOLS) -> PlainChat:
        save_talking(tmp_path, template)
        return plain_chat(tmp_path, special_tokens(tmp_path)[0], tools)

    return forms


def compare(template: str, form: ConversationForm, count: int) -> int:
    """Compare a form with its template on random conversations; returns how many have a place in it."""
    generator, compiled, held = random.Random(2), ChatTemplate(template, "t", "", {"bos_token": "<bos>"}), 0
    for _ in range(count):
        messages = talk(generator)
        try:
            prompt = form.render(messages, written)
        except ValueError:
            continue
        held += 1
        for thinking in form.thinking:
            assert prompt == compiled.render(messages, tools=TOOLS if form.tools else None, thinking=thinking)
    return held


def test_forms_with_and_without_tools_and_thinking(derive: Callable[..., PlainChat]) -> None:
    plain = derive(TALKING)
    expected = [(False, (None, False)), (False, (True,)), (True, (None, False)), (True, (True,))]
    assert [(form.tools, form.thinking) for form in plain.conversations] == expected
    for form in plain.conversations:
        assert (form.thoughts, form.names, form.beside) == (("answer", "call"), True, "after")
        assert compare(TALKING, form, 150) > 90
    metadata = json.loads(json.dumps(plain.metadata()))
    assert metadata["tools"] == TOOLS
    assert metadata["chat"]["trim"]
    assert [form["thinking"] for form in metadata["conversations"]] == [[None, False], [True]] * 2


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, derive: Callable[..., PlainChat]) -> None:
    (old, new), difference = VARIANTS[name]
    assert old in SPEAKING
    template = SPEAKING.replace(old, new, 1)
    (form,) = derive(template, ()).conversations
    usual = {"names": False, "beside": "before"} | difference
    usual["thoughts"] = ("call", "beside") if usual["beside"] else ("call",)
    assert {key: getattr(form, key) for key in usual} == usual
    assert ("thought" in form.trim) == (name == "thoughts trimmed")
    assert ("user" in form.between["user"]) == ("in a row" not in name)
    assert compare(template, form, 60) > 15


@pytest.mark.parametrize("name", WITHOUT_FORM)
def test_no_form_of_calls(name: str, derive: Callable[..., PlainChat]) -> None:
    old, new = WITHOUT_FORM[name]
    assert old in SPEAKING
    plain = derive(SPEAKING.replace(old, new, 1), TOOLS[:1])
    assert not plain.has_tools
    assert "tools" not in plain.metadata()
    assert all("call" not in form.between["user"] for form in plain.conversations)
    assert bool(plain.conversations) == (name not in ("turns numbered", "a word counts", "dated"))


def test_templates_that_know_messages_alone_have_no_form_of_conversations(derive: Callable[..., PlainChat]) -> None:
    plain = derive(TEMPLATE, ())
    assert plain.chat is not None
    assert plain.conversations == ()


def test_messages_without_a_place_are_refused(derive: Callable[..., PlainChat]) -> None:
    (form,) = derive(SPEAKING, ()).conversations
    user, tool = {"role": "user", "content": "x"}, {"role": "tool", "name": "x", "content": "x"}
    call = {"id": "1", "type": "function", "function": {"name": "x", "arguments": {}}}
    calling = {"role": "assistant", "content": "said", "tool_calls": [call]}
    for reason, messages in (
        ("ask cannot follow begin", []),
        ("calls without an answer before a message of tool: 0", [user, tool]),
        ("calls without an answer before a message of tool: 0", [user, calling, tool, tool]),
        ("calls without an answer before a message of user: 1", [user, calling, user]),
        ("calls without an answer before a message of assistant: 1", [user, calling, calling, tool]),
        ("calls without an answer: 1", [user, calling]),
        ("system cannot follow user", [user, {"role": "system", "content": "x"}]),
        ("other is no role", [{"role": "other", "content": "x"}]),
        ("answer is no role", [{"role": "answer", "content": "x"}]),
    ):
        with pytest.raises(ValueError, match=reason):
            form.render(messages, written)
    for change in ({"beside": ""}, {"blanks": False}):
        with pytest.raises(ValueError, match="content beside calls has no place"):
            replace(form, **change).render([user, calling | {"content": " "}, tool], written)
    with pytest.raises(ValueError, match="an answer of a tool has no name"):
        replace(form, names=True).render([user, calling, tool | {"name": ""}], written)


def test_tools_without_a_place_are_refused(derive: Callable[..., PlainChat], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tools: the chat template refuses the messages: tools are not supported"):
        derive(TEMPLATE)
    with pytest.raises(InputError, match="--tools: the chat template leaves out tools"):
        derive(TEMPLATE.replace("{% if tools is not none %}", "{% if false %}"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="and --tools needs both; leave it out"):
        plain_chat(tmp_path, special_tokens(tmp_path)[0], TOOLS)
