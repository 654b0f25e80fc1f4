"""Chats: a checkpoint's template in a bundle, `generate --chat`, and a chat at a terminal."""

import io
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.side_files import chat_template
from exporter.cli.terminal_chat import converse
from exporter.quantization.recipes import RECIPES
from runtime_ref.engine import open_engine
from runtime_ref.errors import InputError
from runtime_ref.streaming import Decoder, open_decoder
from tests.chats import TEMPLATE, with_template
from tests.conftest import Directories, Run
from tests.exporter.cli.conftest import TerminalUser

CONFIGS: dict[str, tuple[object, str | None]] = {
    "text": ("{{ 1 }}", "{{ 1 }}"),
    "list": ([{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 1 }}"}], "{{ 1 }}"),
    "null": (None, None),
}
BROKEN: dict[str, tuple[str, str, str]] = {
    "syntax": (
        "tokenizer_config.json",
        '{"chat_template": "{% if %}"}',
        r"chat_template: not a chat template \(line 1",
    ),
    "number": (
        "tokenizer_config.json",
        '{"chat_template": 3}',
        r"chat_template is 3, expected text or templates by name",
    ),
    "no default": ("tokenizer_config.json", '{"chat_template": [{"name": "rag"}]}', r"with one named default; correct"),
    "odd default": (
        "tokenizer_config.json",
        '{"chat_template": [{"name": "default", "template": 1}]}',
        r"is 1, expected",
    ),
    "JSON": ("tokenizer_config.json", "{", r"tokenizer_config.json"),
    "file": ("chat_template.jinja", "a\n{% endif %}", r"not a chat template \(line 2: .*\); correct or remove it"),
    "bytes": ("chat_template.jinja", "\udcff", r"cannot be read \(.*\); correct or remove it"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_template_of_the_tokenizer_config(name: str, tmp_path: Path) -> None:
    configured, expected = CONFIGS[name]
    assert chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    assert chat_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text("{{ 3 }}")
    assert chat_template(tmp_path) == "{{ 3 }}"


@pytest.mark.parametrize("name", BROKEN)
def test_broken_template_stops_an_export(name: str, chat_pair: Directories, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    target = Path(shutil.copytree(chat_pair[0], tmp_path / "target"))
    (target / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as error:
        export_bundle(
            open_pair(target, chat_pair[1]), tmp_path / "bundle", ExportOptions("onnx", RECIPES["fp32"], max_seq_len=64)
        )
    assert str(error.value).startswith(str(target / file))
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_bundle_has_the_template(chat_bundle: Path) -> None:
    assert (chat_bundle / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template.jinja" in open_engine(chat_bundle).manifest.files


def test_chat_flag(run: Run, chat_bundle: Path) -> None:
    command = ("generate", chat_bundle, "--prompt", "Return the", "--max-new-tokens", 12)
    answer = json.loads(run(*command, "--chat", "--json")[1])
    assert answer["tokens"] != json.loads(run(*command, "--json")[1])["tokens"]
    stream = open_decoder(chat_bundle).chat([{"role": "user", "content": "Return the"}], max_new_tokens=12)
    assert [token.id for token in stream] == answer["tokens"]
    code, out, err = run(*command, "--chat")
    assert (code, out) == (0, answer["text"] + "\n")
    assert "12 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "terminal", "message"),
    [
        (
            ("--chat", "--prompt-ids", "ids.json"),
            True,
            "--chat cannot be used with --prompt-ids; give --prompt instead",
        ),
        (("--prompt", "a", "--prompt-ids", "ids.json"), True, "give one of --prompt, --prompt-file and --prompt-ids"),
        (("--json",), True, "give one of --prompt, --prompt-file and --prompt-ids"),
        (("--chat",), False, "give one of --prompt, --prompt-file and --prompt-ids"),
        (("--chat",), True, "has no chat_template.jinja or no tokenizer.json"),
        (("--chat", "--prompt", "a"), False, "has no chat_template.jinja or no tokenizer.json"),
        (("--system", "a", "--prompt", "b"), True, "--system goes with --chat"),
        (("--system", "a"), True, "has no chat_template.jinja or no tokenizer.json"),
        ((), True, "has no tokenizer.json, which a chat needs; pass --prompt-ids"),
    ],
)
def test_errors(
    arguments: tuple[str, ...],
    terminal: bool,
    message: str,
    run: Run,
    bundle: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)
    path = bundle("dense")
    capsys.readouterr()  # discards what the export printed
    code, out, err = run("generate", path, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decoder, list[str | type[BaseException]]], list[Any]]:
    """Run a chat in which lines are typed, or keys pressed: KeyboardInterrupt for Ctrl-C, and Ctrl-D at the end.

    Returns the messages and the stream of each turn.
    """

    def run_chat(decoder: Decoder, lines: list[str | type[BaseException]]) -> list[Any]:
        inputs, turns = iter([*lines, EOFError]), []
        chat = decoder.chat

        def recorded(messages: Any, **options: Any) -> Any:
            turns.append(([message["content"] for message in messages], stream := chat(messages, **options)))
            return stream

        def line(sign: str) -> str:
            if isinstance(typed_line := next(inputs), str):
                return typed_line
            raise typed_line

        monkeypatch.setattr("builtins.input", line)
        monkeypatch.setattr(decoder, "chat", recorded)
        converse(decoder, {"max_new_tokens": 20, "num_draft_tokens": 2})
        return turns

    return run_chat


def test_interrupted_answer_stays(
    typed: Callable[..., list[Any]], chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    decoder = open_decoder(chat_bundle, threads=1)
    verify, calls, before = decoder.engine.verify, [0], signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return verify(*arguments)

    monkeypatch.setattr(decoder.engine, "verify", interrupted)
    first, second, third = typed(decoder, ["a", KeyboardInterrupt, "b", "  ", KeyboardInterrupt, " /new ", "c"])
    assert (first[1].stats.finish_reason, second[1].stats.finish_reason) == ("cancelled", "length")
    assert 1 < len(first[1].tokens) < 20
    assert second[0] == ["a", first[1].text, "b"]
    assert second[1].stats.reused_tokens >= len(first[1].prompt) - 1
    assert third[0] == ["c"]
    assert signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    assert err.count("ends the chat") == 1
    assert f"{second[1].stats.reused_tokens} prompt tokens reused" in err


LONG = "Return the value of the list, " * 40  # more than one chunk of tokens


def test_an_interrupted_prompt_is_left_out(
    typed: Callable[..., list[Any]], chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C while a long message is run: no pass follows, and the conversation goes on as it was before it."""
    decoder, passes = open_decoder(chat_bundle, threads=1), []
    engine: Any = decoder.engine
    run, chunk = engine.run_target, engine.manifest.limits["num_tokens"]

    def interrupted(tokens: Any, rows: Any) -> Any:
        passes.append(len(tokens))
        if passes == [chunk, chunk]:
            signal.raise_signal(signal.SIGINT)
        return run(tokens, rows)

    first = typed(decoder, ["a", "/quit"])[0]
    monkeypatch.setattr(engine, "run_target", interrupted)
    decoder.forget()
    long, second, again = typed(decoder, [LONG, "a", LONG])
    assert (long[1].stats.finish_reason, long[1].tokens, long[1].thought) == ("cancelled", [], "")
    assert (second[0], second[1].tokens) == (["a"], first[1].tokens)
    assert again[0] == ["a", second[1].text, LONG]
    assert len(again[1].tokens) == 20
    err = capsys.readouterr().err
    assert err.count("0 tokens (cancelled)") == err.count("the conversation goes on without your message") == 1
    assert "ends the chat" not in err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_prompt_shows_its_progress(
    terminal: bool, run: Run, chat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, and only there; standard output holds the text alone, and --json shows nothing."""
    shown = io.StringIO()
    monkeypatch.setattr(
        "exporter.cli.printing.err", Console(file=shown, force_terminal=terminal, width=100, highlight=False)
    )
    long = ("generate", chat_bundle, "--prompt", LONG, "--max-new-tokens", 3)
    _, out, err = run(*long)
    assert out.startswith(LONG) and "reading" not in out + err
    progress = re.findall(r"reading the prompt: (\d+) of (\d+) tokens", shown.getvalue())
    assert bool(progress) == terminal
    assert len({total for _, total in progress}) == int(terminal)
    assert "3 tokens (length)" in shown.getvalue()
    shown.truncate(0)
    assert run(*long, "--json")[2] == shown.getvalue() == ""
    run("generate", chat_bundle, "--prompt", "Return the", "--max-new-tokens", 3)
    assert "reading" not in shown.getvalue()


def test_lines_joined_by_a_backslash(typed: Callable[..., list[Any]], chat_bundle: Path) -> None:
    (turn,) = typed(open_decoder(chat_bundle, threads=1), ["one\\", "two\\", "three"])
    assert turn[0] == ["one\ntwo\nthree"]


@pytest.mark.parametrize("content", ["Return the\nvalue", "Return the\nvalue\n", "\ufeffReturn the\nvalue\r\n"])
def test_prompts_from_files_and_standard_input(
    content: str, run: Run, chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_bytes(content.encode())
    command = ("generate", chat_bundle, "--max-new-tokens", 5, "--json")
    expected = json.loads(run(*command, "--prompt", "Return the\nvalue")[1])["tokens"]
    assert json.loads(run(*command, "--prompt-file", tmp_path / "prompt")[1])["tokens"] == expected
    with (tmp_path / "prompt").open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert json.loads(run(*command, "--prompt", "-")[1])["tokens"] == expected


@pytest.mark.parametrize(("content", "message"), [(b"", "the prompt is empty"), (b"a\xff", "is not UTF-8 (invalid")])
def test_prompt_files_that_are_refused(content: bytes, message: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(content)
    for arguments in (("--prompt-file", tmp_path / "prompt"), ("--chat", "--prompt-file", tmp_path / "prompt")):
        code, out, err = run("generate", tmp_path, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    code, _, err = run("generate", tmp_path, "--prompt-file", tmp_path / "none")
    assert (code, err) == (2, f"error: {tmp_path / 'none'}: No such file or directory\n")


def test_system_prompts(run: Run, chat_bundle: Path, tmp_path: Path) -> None:
    command = ("--prompt", "Return the", "--chat", "--max-new-tokens", 8, "--json")
    decoder = open_decoder(chat_bundle, threads=1)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Return the"}]
    expected = [token.id for token in decoder.chat(messages, max_new_tokens=8)]
    assert json.loads(run("generate", chat_bundle, *command, "--system", "Be brief.")[1])["tokens"] == expected
    silent = with_template(
        chat_bundle, tmp_path / "silent", "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    code, _, err = run("generate", silent, *command, "--system", "Be brief.")
    assert (code, err) == (2, f"error: {silent}: its chat template leaves out system prompts; leave out --system\n")


def test_a_system_prompt_stays_in_a_chat(chat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, lines, asked = open_decoder(chat_bundle, threads=1), iter(["a", "/new", "b", EOFError]), []
    chat = decoder.chat

    def line(_: str) -> str:
        if isinstance(typed_line := next(lines), str):
            return typed_line
        raise typed_line

    def recorded(messages: Any, **options: Any) -> Any:
        asked.append([message["content"] for message in messages])
        return chat(messages, **options)

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(decoder, "chat", recorded)
    converse(decoder, {"max_new_tokens": 2}, "Be brief.")
    assert asked == [["Be brief.", "a"], ["Be brief.", "b"]]


def test_stop_strings(run: Run, bundle: Callable[[str], Path]) -> None:
    command = ("generate", bundle("demo"), "--prompt", "Return the", "--max-new-tokens", 20, "--json")
    whole = json.loads(run(*command)[1])["text"]
    stops = ("no such text", "None")
    answer = json.loads(run(*command, *(word for stop in stops for word in ("--stop", stop)))[1])
    assert "None" in whole and answer["text"] == whole[: whole.index("None")]
    assert answer["finish_reason"] == "stop"


def test_full_context_is_reported(typed: Callable[..., list[Any]], chat_bundle: Path, capsys: Any) -> None:
    """The line that did not fit is not in the conversation."""
    long = "return " * 700
    first, second = typed(open_decoder(chat_bundle, threads=1), [long, "a", long, "\udcff", "b"])
    assert (first[0], second[0]) == (["a"], ["a", first[1].text, "b"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 3
    assert re.match(r"error: the prompt has \d+ tokens, the bundle's context has 600 .*--max-seq-len$", errors[0])
    assert re.match(r"error: the prompt has \d+ tokens, .*--max-seq-len, or start over with /new$", errors[1])
    assert re.match(r"error: the prompt is not valid UTF-8", errors[2])


# The first answer waits in its third pass until it is stopped. A pipe, because a lock that the main thread holds would
# never be given to the handler of a signal.
WAITING = """
import os
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.token_stream import Stream
verify, cancel, passes, (stopped, stop) = GraphEngine.verify, Stream.cancel, [], os.pipe()
def waiting(*arguments):
    passes.append(arguments)
    if len(passes) == 3:
        os.read(stopped, 1)
    return verify(*arguments)
def cancelled(stream):
    cancel(stream)
    os.write(stop, b"x")
GraphEngine.verify, Stream.cancel = waiting, cancelled
"""


def test_conversation_on_a_terminal(user_of: Callable[..., TerminalUser], chat_bundle: Path) -> None:
    """The chat goes on after Ctrl-C in an answer.

    Ctrl-C at the prompt is tested without a terminal: if it arrives while readline handles a key, Python notices it at
    the next key only.
    """
    expected = open_decoder(chat_bundle).chat([{"role": "user", "content": "why"}], max_new_tokens=300)
    answer = "".join(token.text for token in expected).replace("\n", "\r\n")
    user = user_of("generate", chat_bundle, "--max-new-tokens", 300, "--mode", "plain", before=WAITING)
    assert "Chat: /new starts a new conversation" in user.read_until(r"\n> ")
    user.type_keys("return the value\r")
    user.read_until(r"return the value\s*\S")  # the answer has begun
    assert user.program.poll() is None
    user.type_keys("\x03")
    assert "(cancelled)" in user.read_until(r"tokens \(\w+\).*?\n> ")
    user.type_keys("and then\r")
    output = user.read_until(r"\d+ tokens \(\w+\).*?\n> ")
    assert int(re.findall(r"(\d+) prompt tokens reused", output)[0]) > 4
    assert re.findall(r"(\d+) tokens \((?:length|eos)\)", output)
    user.type_keys("/new\r")
    user.read_until(r"> ")
    user.type_keys("a\x7fwhy\r")
    assert f"{answer}\r\n{len(expected.tokens)} tokens" in user.read_until(r"\d+ tokens \(\w+\).*?\n> ")
    assert user.leave() == 0


def test_lines_on_a_terminal(user_of: Callable[..., TerminalUser], chat_bundle: Path, tmp_path: Path) -> None:
    without = with_template(chat_bundle, tmp_path / "without", None)
    user = user_of("generate", without, "--max-new-tokens", 3)
    assert "no chat template, so each line is continued as a text of its own" in user.read_until(r"\n> ")
    expected = "".join(token.text for token in open_decoder(without).stream("return the value", max_new_tokens=3))
    for _ in range(2):
        user.type_keys("return the value\r")
        output = user.read_until(r"\d+ tokens \(\w+\).*?\n> ")
        answer = expected.replace("\n", "\r\n")
        assert f"return the value\r\n{answer}\r\n3 tokens (length)" in output
    user.type_keys("/system Be brief.\r")
    assert "no chat template, so each line" in user.read_until(r"end.*?\n> ")
    user.type_keys("\x1b[200~return\rthe value\x1b[201~\r")  # pasted lines are one message
    assert "3 tokens" in user.read_until(r"\d+ tokens \(\w+\).*?\n> ")
    assert user.unread == ""
    user.type_keys("/quit\r")
    assert user.program.wait(120) == 0
