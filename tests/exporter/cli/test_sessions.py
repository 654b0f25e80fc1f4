"""`generate --session` and `prefill`: conversations that are kept in files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from exporter.cli import generate_command
from runtime_ref.locks import locked
from runtime_ref.streaming import open_decoder
from tests.conftest import Run

PROMPT = "Return the value of the "


def generated(run: Run, *arguments: object) -> dict[str, Any]:
    code, printed, error = run("generate", *arguments, "--max-new-tokens", 8, "--json")
    assert code == 0, error
    return json.loads(printed)


def test_a_text_goes_on_from_its_session(run: Run, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    session = tmp_path / "session"
    first = generated(run, bundle("demo"), "--prompt", PROMPT, "--session", session)
    assert first["session"] == str(session)
    tokens = load_file(session)["tokens"].tolist()
    assert tokens[-7:] == first["tokens"][:7]
    (tmp_path / "ids").write_text(json.dumps([*tokens, first["tokens"][-1], 77, 78]))
    again = generated(run, bundle("demo"), "--prompt-ids", tmp_path / "ids", "--session", session)
    alone = generated(run, bundle("demo"), "--prompt-ids", tmp_path / "ids")
    assert again["tokens"] == alone["tokens"]
    assert (again["reused_prompt_tokens"], alone["reused_prompt_tokens"]) == (len(tokens), 0)
    assert "session" not in alone
    assert load_file(session)["tokens"].tolist()[: len(tokens)] == tokens


def test_a_session_is_of_one_process_at_a_time(run: Run, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Else the second would replace what the first has saved."""
    command = "generate", bundle("demo"), "--prompt", PROMPT, "--session", tmp_path / "session"
    with locked(tmp_path / ".session.use.lock"):
        code, _, error = run(*command)
    assert (code, "session: another process is writing it" in error) == (2, True)
    assert run(*command, "--max-new-tokens", 2)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["session"]


def test_a_chat_goes_on_from_its_session(run: Run, chat_bundle: Path, tmp_path: Path) -> None:
    chat = chat_bundle, "--chat", "--session", tmp_path / "session"
    first = generated(run, *chat, "--prompt", "Return the")
    second = generated(run, *chat, "--prompt", "And the other one")
    messages = [
        {"role": "user", "content": "Return the"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "And the other one"},
    ]
    with open_decoder(chat_bundle, threads=1) as decoder:
        assert [token.id for token in decoder.chat(messages, max_new_tokens=8)] == second["tokens"]
        conversation = decoder.open_session(tmp_path / "session")
        assert conversation.messages == [*messages, {"role": "assistant", "content": second["text"]}]
    assert second["reused_prompt_tokens"] > 5
    code, printed, error = run("generate", *chat, "--system", "Be brief.", "--prompt", "a")
    assert (code, printed) == (2, "")
    assert error.endswith("has a chat already; leave out --system, or choose another file\n")
    before = (tmp_path / "session").read_bytes()
    code, printed, error = run("generate", chat_bundle, "--session", tmp_path / "session", "--prompt", "a")
    assert (code, printed) == (2, "")
    assert error.endswith("has a chat, which a text would replace; pass --chat, or choose another file\n")
    assert (tmp_path / "session").read_bytes() == before


def test_a_chat_on_a_terminal_is_saved_when_it_ends(
    run: Run, chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Return the", EOFError])

    def line(_: str) -> str:
        if isinstance(typed := next(lines), str):
            return typed
        raise typed

    def chat() -> Any:
        assert run("generate", chat_bundle, "--session", tmp_path / "session", "--max-new-tokens", 4)[0] == 0
        with open_decoder(chat_bundle, threads=1) as decoder:
            return decoder.open_session(tmp_path / "session").messages

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(generate_command.sys.stdin, "isatty", lambda: True, raising=False)
    first = chat()
    assert [message["role"] for message in first] == ["user", "assistant"]
    lines = iter(["More", "/quit"])
    assert [message["content"] for message in chat()[:3]] == [*(message["content"] for message in first), "More"]
    lines = iter([EOFError])
    assert len(chat()) == 4
    lines = iter(["/new", EOFError])
    assert chat() == []


def test_a_chat_is_saved_after_each_answer(
    run: Run, chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing ends it as a user would: the terminal is closed, and the process is killed."""
    seen = []

    def line(_: str) -> str:
        with open_decoder(chat_bundle, threads=1) as decoder:
            seen.append(len(decoder.open_session(session).messages or []) if session.exists() else None)
        return "Return the" if len(seen) < 3 else "/quit"

    session = tmp_path / "session"
    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr(generate_command.sys.stdin, "isatty", lambda: True, raising=False)
    assert run("generate", chat_bundle, "--session", session, "--max-new-tokens", 4)[0] == 0
    assert seen == [None, 2, 4]


def test_an_interrupted_text_is_saved(
    run: Run, bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.cli.printing.stats_line", interrupted)
    assert run("generate", bundle("demo"), "--prompt", PROMPT, "--session", tmp_path / "session")[0] != 0
    assert len(load_file(tmp_path / "session")["tokens"]) > 10


def test_prefill_of_a_text(run: Run, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """All tokens of the prompt are in the file; what follows it is run alone."""
    session = tmp_path / "session"
    command = "prefill", bundle("demo"), "--prompt", PROMPT * 30, "--output", session
    code, printed, error = run(*command, "--json")
    assert code == 0, error
    document = json.loads(printed)
    with open_decoder(bundle("demo"), threads=1) as decoder:
        assert decoder.tokenizer is not None
        tokens = decoder.tokenizer.encode(PROMPT * 30)
    assert load_file(session)["tokens"].tolist() == tokens
    assert (document["session"], document["tokens"], document["bytes"]) == (
        str(session),
        len(tokens),
        session.stat().st_size,
    )
    (tmp_path / "ids").write_text(json.dumps([*tokens, 77]))
    again = generated(run, bundle("demo"), "--prompt-ids", tmp_path / "ids", "--session", session)
    assert again["reused_prompt_tokens"] == len(tokens)
    code, _, error = run(*command)
    assert code == 2 and "exists already" in error
    code, printed, _ = run(*command, "--force")
    assert code == 0 and f"{len(tokens)} tokens, run in" in printed
    assert load_file(session)["tokens"].tolist() == tokens


def test_prefill_of_a_chat(run: Run, chat_bundle: Path, tmp_path: Path) -> None:
    """What is in the file is reused, whatever the first message of the user is."""
    session = tmp_path / "session"
    code, printed, error = run(
        "prefill", chat_bundle, "--prompt", "Return the shortest answer.", "--chat", "--output", session, "--json"
    )
    assert code == 0, error
    tokens = json.loads(printed)["tokens"]
    content = session.read_bytes()
    for message in ("Return", "0", "é", "Why?"):
        session.write_bytes(content)
        answer = generated(run, chat_bundle, "--chat", "--prompt", message, "--session", session)
        asked = "--chat", "--prompt", message, "--system", "Return the shortest answer."
        assert answer["tokens"] == generated(run, chat_bundle, *asked)["tokens"]
        assert answer["reused_prompt_tokens"] >= tokens - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prefill", "B", "--output", "s"), "give one of --prompt"),
        (("prefill", "B", "--prompt", "a", "--output", "none/s"), "its directory is missing"),
        (("prefill", "B", "--prompt-ids", "ids", "--output", "s"), "has 2 prompts, expected one"),
        (("prefill", "B", "--prompt-ids", "ids", "--chat", "--output", "s"), "--chat cannot be used"),
        (
            ("prefill", "B", "--prompt", "a", "--thinking", "--output", "s"),
            "--thinking or --no-thinking goes with --chat",
        ),
        (("prefill", "B", "--prompt", "a", "--chat", "--output", "s"), "no chat template|has no chat_template"),
        (("generate", "B", "--prompt-ids", "ids", "--session", "s"), "--session goes with one prompt"),
        (("generate", "B", "--prompt", "a", "--session", "none/s"), "its directory is missing"),
        (("generate", "B", "--prompt", "a", "--session", "ids"), "not a session file"),
        (("generate", "B", "--prompt", "a", "--session", "."), "exists and is not a file"),
    ],
)
def test_errors(
    arguments: tuple[str, ...],
    message: str,
    run: Run,
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ids").write_text("[[1, 2], [3]]")
    code, printed, error = run(*(str(bundle("demo")) if word == "B" else word for word in arguments))
    assert (code, printed, error.count("\n")) == (2, "", 1), error
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_a_new_chat_keeps_the_system_prompt_of_its_session(
    run: Run, chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, system = tmp_path / "session", {"role": "system", "content": "Be brief."}
    chat = "generate", chat_bundle, "--session", session, "--max-new-tokens", 2
    assert run(*chat, "--chat", "--system", "Be brief.", "--prompt", "Return the")[0] == 0
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(generate_command.sys.stdin, "isatty", lambda: True, raising=False)
    lines = iter(["/new", "Another", "/quit"])
    assert run(*chat)[0] == 0
    with open_decoder(chat_bundle, threads=1) as decoder:
        messages = decoder.open_session(session).messages or []
    assert messages[:2] == [system, {"role": "user", "content": "Another"}]
    assert len(messages) == 3


def test_a_link_that_leads_nowhere_is_refused_before_the_text(
    run: Run, bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    session = tmp_path / "link"
    session.symlink_to(tmp_path / "missing" / "session")
    code, printed, error = run("generate", bundle("demo"), "--prompt", PROMPT, "--session", session)
    assert (code, printed) == (2, "")
    assert (
        error
        == f"error: {session}: its directory is missing or cannot be written to; create it, or choose another file\n"
    )
