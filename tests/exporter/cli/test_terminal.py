"""What commands do on terminals and pipes of all kinds, and with errors that nobody foresaw."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from exporter.cli import generate_command
from exporter.terminal import UNEXPECTED, print_json, progress_bar
from tests.conftest import Run

COMMAND = Path(sys.executable).parent / "gemma-mtp-export"


def test_a_bar_shows_the_time_left_of_steps_that_take_minutes() -> None:
    now, shown = [0.0], io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, get_time=lambda: now[0])
    with progress_bar(console, "bits", 50) as progress:
        for layer in range(2):
            now[0] += 60
            progress(f"layer {layer}", 10)
    assert "bits: layer 1" in shown.getvalue()
    assert "0:03:00" in shown.getvalue()


def test_an_unexpected_error_is_one_line_with_a_code_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(generate_command, "open_bundle", broken)
    code, out, err = run("generate", "bundle", "--prompt", "a")
    assert (code, out, err.count("\n")) == (UNEXPECTED, "", 1)
    assert "error: unexpected RuntimeError: no such thing (test_terminal.py, line " in err
    assert "please report it, with what the same command prints with --traceback" in err
    for arguments in (("generate", "bundle", "--prompt", "a", "--traceback"), ("--traceback", "generate", "bundle")):
        code, _, err = run(*arguments, *(() if "--prompt" in arguments else ("--prompt", "a")))
        assert code == UNEXPECTED
        assert "Traceback" in err and "in broken" in err and err.splitlines()[-1].startswith("error: unexpected")


def test_traceback_shows_where_a_refusal_comes_from(run: Run, tmp_path: Path) -> None:
    code, _, err = run("inspect", tmp_path / "no", "--traceback")
    assert code == 2
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json("export", {"a": [1.5, float("nan"), (float("inf"),)], "b": {"c": -float("inf")}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "schema_version": 1,
        "a": [1.5, None, [None]],
        "b": {"c": None},
    }


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_in_any_encoding(encoding: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    """A prompt is printed before its continuation: what the encoding lacks is escaped."""
    (tmp_path / "prompt").write_text("naïve — 中文 👩‍💻\n", encoding="utf-8")
    command = [COMMAND, "generate", bundle("demo"), "--prompt-file", tmp_path / "prompt", "--max-new-tokens", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (result.returncode, result.stderr.count(b"\n")) == (0, 1), result.stderr
    # Click takes ASCII for a missing setting, and writes UTF-8.
    text = result.stdout.decode("utf-8" if encoding == "ascii" else encoding)
    assert ("中文" in text) == (encoding in ("ascii", "utf-8"))
    assert ("\\u4e2d" in text) == (encoding in ("latin-1", "cp1252"))


@pytest.mark.parametrize("settings", [{"COLUMNS": "0"}, {"TERM": "dumb"}, {"COLUMNS": "1"}, {}], ids=str)
def test_terminals_without_a_width(settings: dict[str, str], bundle: Callable[..., Path]) -> None:
    """A new pseudo terminal has no columns until somebody sets them."""
    controller, terminal = pty.openpty()
    command = [COMMAND, "inspect", bundle("tiny")]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | settings
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        text = b""
        while block := _read(controller):
            text += block
    os.close(controller)
    assert process.returncode == 0, text
    assert b"onnx" in text.replace(b"\r\n", b"") or settings.get("COLUMNS") == "1"


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other side of a pseudo terminal was closed
        return b""


def test_onnx_runtime_prints_nothing_beside_the_error(bundle: Callable[..., Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle("tiny"), tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    for kv in manifest["kv"]["buffers"]:
        kv["head_dim"] += 1  # the graph refuses such buffers when it runs
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "ids").write_text("[3, 4]")
    command = [COMMAND, "generate", copy, "--prompt-ids", tmp_path / "ids"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "cannot run" in result.stderr


def test_a_reader_that_ends_is_no_failed_check(bundle: Callable[..., Path]) -> None:
    with subprocess.Popen([COMMAND, "inspect", bundle("tiny"), "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 141


def test_an_error_that_nobody_reads_has_its_code(tmp_path: Path) -> None:
    """1 would be a failed check."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as nobody:
        assert subprocess.run([COMMAND, "inspect", tmp_path / "no"], stderr=nobody, check=False).returncode == 2


def test_closed_outputs(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Text that nobody can read is no success; without a standard error, a command does what it does with one."""
    (tmp_path / "ids").write_text("[3, 4]")
    command = [COMMAND, "generate", bundle("tiny"), "--prompt-ids", tmp_path / "ids", "--max-new-tokens", "2", "--json"]
    for closed, code in ((">&-", 141), ("2>&-", 0)):
        result = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (code, b"")
    assert len(json.loads(result.stdout)["tokens"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "give one of --prompt, --prompt-file and --prompt-ids"), (("--prompt", "-"), "standard input is closed")],
)
def test_a_closed_standard_input(arguments: tuple[str, ...], message: str, bundle: Callable[..., Path]) -> None:
    command = [COMMAND, "generate", bundle("tiny"), *arguments]
    result = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
