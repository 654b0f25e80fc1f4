"""The reference of commands, docs/cli.md, and the help texts that it is made from."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from exporter.cli.command_reference import command_contexts, render_reference
from exporter.cli.main import COMMANDS
from exporter.cli.options import ARGUMENTS
from exporter.demo.synthetic import synthetic
from exporter.demo.training import qat, train

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
SCRIPT = """
import sys
from exporter.cli.main import cli
cli.main(["--help"], standalone_mode=False)
assert "torch" not in sys.modules
"""


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "run `make docs`"


def test_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    page = render_reference()
    monkeypatch.setenv("COLUMNS", "40")
    assert render_reference() == page


def test_summaries_are_the_first_sentences_of_docstrings() -> None:
    docstrings = {name: " ".join((context.command.help or "").split()) for name, context in command_contexts().items()}
    assert {name: re.split(r"(?<=\.) ", text)[0] for name, text in docstrings.items()} == dict(COMMANDS)


def test_every_parameter_has_a_help_text() -> None:
    commands = [*(context.command for context in command_contexts().values()), synthetic, qat.main, train.main]
    for command in commands:
        for param in command.params:
            text = param.help if isinstance(param, click.Option) else ARGUMENTS.get(param.name or "")
            assert text, f"{command.name} {param.name}"
            assert text[0].isupper(), text
            assert text.endswith("."), text


def test_help_does_not_import_torch() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [name for name in COMMANDS if f"\n  {name} " not in result.stdout] == []
