"""Thoughts and calls of tools on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from exporter.checkpoint.special_tokens import special_tokens
from exporter.cli import generate_command
from exporter.cli.terminal_chat import converse
from runtime_ref.chat import open_template
from runtime_ref.errors import InputError
from runtime_ref.streaming import Decoder
from runtime_ref.tokenizer import TextTokenizer
from tests.chats import TEMPLATE, WEATHER, save_talking
from tests.conftest import Run
from tests.scripted import scripted

CALL = '<|channel>thought\nLook.\n<channel|><|tool_call>call:weather{place:<|"|>Bern<|"|>}<tool_call|><|tool_response>'


@pytest.fixture
def writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Decoder]:
    """Return a function that lets `generate` open a decoder which writes given texts."""

    def decoder(*texts: str, template: str | None = None) -> Decoder:
        save_talking(tmp_path)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        tokens = special_tokens(tmp_path)[0]
        tokenizer = TextTokenizer(tmp_path, tokens)
        script = [token for text in texts for token in tokenizer.encode(text)[1:]]
        made = scripted(tokens, script, tokenizer, open_template(tmp_path, tokenizer))
        monkeypatch.setattr(generate_command, "open_bundle", lambda *_: made)
        (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
        return made

    return decoder


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    options = ("--mode", "plain", "--tools", tmp_path / "tools.json", "--thinking")
    return ("generate", tmp_path, "--chat", "--prompt", "What now?", *options)


def test_the_document_has_each_part(writes: Callable[..., Decoder], command: tuple[object, ...], run: Run) -> None:
    decoder = writes(f"Wait.{CALL}")
    code, out, _ = run(*command, "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["text"], document["thought"]) == ("Wait.", "Look.")
    (call,) = document["tool_calls"]
    assert (call["name"], call["arguments"], call["problem"]) == ("weather", {"place": "Bern"}, "")
    assert decoder.current is not None and decoder.tokenizer is not None
    assert document["tokens"] == decoder.tokenizer.encode(f"Wait.{CALL}")[1:]
    prompt = decoder.tokenizer.decode(decoder.current.prompt, special=True)
    assert prompt.startswith("<bos><|turn>system\n<|think|>\n<|tool>weather{")


def test_the_answer_alone_is_on_standard_output(
    writes: Callable[..., Decoder], command: tuple[object, ...], run: Run
) -> None:
    writes("<|channel>thought\nLook.\n<channel|>It rains.<turn|>", CALL, "<|tool_call>call:weather{<tool_call|><turn|>")
    assert run(*command)[:2] == (0, "It rains.\n")
    code, out, error = run(*command)
    assert (code, out.strip()) == (0, 'weather({"place": "Bern"})')
    assert error.startswith("Look.\n")
    code, out, error = run(*command)
    assert (code, out.strip()) == (0, "")
    assert "a call of a tool cannot be read (expected ':' after ''): call:weather{" in error


def test_the_user_answers_for_tools(
    writes: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, asked, signs = writes(CALL, "So.\n<channel|>It rains.<turn|>", "Bye.<turn|>"), [], []
    lines = iter(["/system Be brief.", "What now?", "rain", "/system", "Hi.", "/quit"])
    chat = decoder.chat

    def line(sign: str) -> str:
        signs.append(sign)
        return next(lines)

    def recorded(messages: Any, **options: Any) -> Any:
        asked.append([*messages])
        return chat(messages, **options)

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(decoder, "chat", recorded)
    converse(decoder, {"num_draft_tokens": 0}, None, {"tools": [WEATHER], "thinking": True})
    assert signs == ["> ", "> ", "weather> ", "> ", "> ", "> "]
    first, second, third = asked
    assert [message["role"] for message in second] == ["system", "user", "assistant", "tool"]
    assert second[:2] == first
    call = second[2]["tool_calls"][0]
    assert second[3] == {"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": "rain"}
    assert third == [{"role": "user", "content": "Hi."}]
    assert click.unstyle(capsys.readouterr().err).count("Look.") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tools", "tools.json"), "--tools goes with --chat"),
        (("--no-thinking",), "--thinking or --no-thinking goes with --chat"),
        (("--chat", "--tools", "none.json"), "none.json: not found; expected a list of tools"),
        (("--chat", "--tools", "tokenizer.json"), "tokenizer.json: expected a JSON list of tools"),
        (("--chat", "--tools", "tools.json"), "the chat template leaves out tools"),
        (("--strict-tools",), "--strict-tools goes with --chat"),
        (("--chat", "--strict-tools"), "--strict-tools goes with --tools"),
        (("--chat", "--thinking-budget", 3), "a thinking budget is about thoughts"),
        (("--chat", "--thinking"), "the chat template has no enable_thinking"),
        (("--chat", "--no-thinking", "--thinking-budget", 3), "leave out --thinking-budget"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options: tuple[Any, ...], message: str, writes: Callable[..., Decoder], tmp_path: Path, run: Run
) -> None:
    writes("a", template=TEMPLATE.replace("{% if tools is not none %}", "{% if false %}"))
    paths = [tmp_path / option if str(option).endswith(".json") else option for option in options]
    code, out, error = run("generate", tmp_path, "--prompt", "a", *paths)
    assert (code, out) == (2, "")
    assert message in " ".join(error.split())


def test_a_system_prompt_that_is_left_out(writes: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = writes("a", template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    lines = iter(["/system Be brief.", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse(decoder, {})
    with pytest.raises(InputError, match="leaves out system prompts"):
        converse(decoder, {}, "Be brief.")
