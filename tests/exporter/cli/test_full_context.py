"""`generate --when-full`, and what the commands say of the room that is left."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

from runtime_ref.manifest import read_manifest
from tests.conftest import Run
from tests.exporter.cli.conftest import TerminalUser

PROMPT = "Return the value of the "


def test_a_text_goes_on_beyond_a_full_context(run: Run, bundle: Callable[[str], Path]) -> None:
    context = read_manifest(bundle("demo")).max_seq_len
    count = context + 50
    endless = [option for token in read_manifest(bundle("demo")).eos for option in ("--suppress", token)]
    common = "generate", bundle("demo"), "--prompt", PROMPT, "--max-new-tokens", count, *endless, "--json"
    stopped, shifted, plain = (
        json.loads(run(*common, *options)[1])
        for options in ((), ("--when-full", "shift"), ("--when-full", "shift", "--mode", "plain"))
    )
    assert (stopped["finish_reason"], stopped["tokens_left"], stopped["dropped_tokens"]) == ("max_seq_len", 0, 0)
    assert shifted["tokens"] == plain["tokens"]
    assert shifted["tokens"][: len(stopped["tokens"])] == stopped["tokens"]
    assert shifted["finish_reason"] == "length"
    assert shifted["dropped_tokens"] == context - context // 2
    assert len(shifted["tokens"]) == count


def test_a_session_says_how_much_is_left(run: Run, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    session, manifest = tmp_path / "session", read_manifest(bundle("demo"))
    code, printed, _ = run("prefill", bundle("demo"), "--prompt", PROMPT, "--output", session, "--json")
    tokens = json.loads(printed)["tokens"]
    code, printed, error = run("inspect", session, "--json")
    assert code == 0, error
    assert json.loads(printed) == {
        "schema_version": 1,
        **{"kind": "session", "digest": manifest.digest, "tokens": tokens, "max_seq_len": manifest.max_seq_len},
        **{"tokens_left": manifest.max_seq_len - tokens, "total_bytes": session.stat().st_size},
    }
    assert re.search(r"tokens_left[ │]+\d+", run("inspect", session)[1])
    code, _, error = run("inspect", Path(__file__))
    assert code == 2 and re.search(r"not a session file .*; or pass the directory of a bundle or a checkpoint$", error)


def test_a_chat_on_a_terminal_goes_on_in_a_full_context(
    user_of: Callable[..., TerminalUser], chat_bundle: Path
) -> None:
    context = read_manifest(chat_bundle).max_seq_len
    user = user_of("generate", chat_bundle, "--max-new-tokens", 60)
    left, dropped = [], 0
    for _ in range(12):
        user.type_keys("return the value and the " + "list of the names " * 12 + "\r")
        output = user.read_until(r"\d+ tokens left.*?\n> ")
        left.append(int(re.findall(r"(\d+) tokens\s+left", output)[0]))
        dropped = int((re.findall(r"the\s+oldest\s+(\d+)\s+messages", output) or [0])[0])
        assert "error" not in output
    assert max(left) < context
    assert any(after > before for before, after in itertools.pairwise(left))
    assert dropped >= 2
    assert user.leave() == 0
