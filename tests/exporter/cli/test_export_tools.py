"""Exports with tools, which go into the manifest where prompts that offer them have a form without Jinja."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from tests.chats import SPEAKING, TEMPLATE, WEATHER, save_talking
from tests.conftest import Directories, Run
from tests.test_schemas import MANIFEST_SCHEMA

NUMBERED = SPEAKING.replace("<|tool_call>call:' ~", "<|tool_call>call:' ~ loop.index ~")


@pytest.fixture
def export(chat_pair: Directories, tmp_path: Path, run: Run) -> object:
    """Return a function that exports a pair with a template and tools, and returns what `run` does."""
    target = Path(shutil.copytree(chat_pair[0], tmp_path / "target"))

    def call(template: str, tools: object = (WEATHER,)) -> tuple[int, str, str]:
        save_talking(target, template)
        (tmp_path / "tools.json").write_text(json.dumps(tools))
        options = ("--recipe", "fp32", "--max-seq-len", "600", "--tools", tmp_path / "tools.json", "--json")
        return run("export", "--target", target, "--drafter", chat_pair[1], "--output", tmp_path / "bundle", *options)

    return call


@pytest.mark.parametrize(("template", "has_form"), [(SPEAKING, True), (NUMBERED, False)])
def test_tools_are_in_the_manifest_where_they_have_a_form(
    template: str, has_form: bool, export: Run, tmp_path: Path
) -> None:
    code, out, error = export(template)
    assert code == 0, error
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    assert manifest.get("tools", []) == [WEATHER] * has_form
    assert [form["tools"] for form in manifest["conversations"]] == [False, True][: 1 + has_form]
    warned = [line for line in json.loads(out)["warnings"] if "no form without Jinja" in line]
    assert bool(warned) != has_form
    assert ("these tools have no form without Jinja" in " ".join(error.split())) != has_form


def test_tools_that_cannot_be_offered_are_refused_at_once(export: Run, tmp_path: Path) -> None:
    for template, tools, message in (
        (TEMPLATE, [WEATHER], "target: --tools: the chat template refuses the messages: tools are not supported"),
        (SPEAKING, {"a": 1}, "tools.json: expected a JSON list of tools"),
        (SPEAKING, [], "tools.json: has no tools; leave --tools out"),
        (SPEAKING, [{"x": float("nan")}], "tools.json: Out of range float values are not JSON compliant"),
        (SPEAKING, [3], "tools.json: a tool is 3, expected an object"),
        (SPEAKING, [{"function": {"name": 5}}], "expected a function with a name, which is a text"),
        (SPEAKING, [{"function": {"name": "f", "parameters": []}}], "the tool f has parameters that are no object"),
        (SPEAKING, [{"function": {"name": "f"}}] * 2, "two tools are called f"),
    ):
        code, out, error = export(template, tools)
        assert (code, out) == (2, "")
        assert message in " ".join(error.split())
        assert not (tmp_path / "bundle").exists()
