"""The names that an application imports from runtime_ref, and what importing them loads."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import runtime_ref

NAMES = {
    "open_decoder",
    "Decoder",
    "Conversation",
    "Stream",
    "Token",
    "ToolCall",
    "Stats",
    "Sampling",
    "InputError",
    "CheckError",
}
README = (Path(runtime_ref.__file__).parent / "README.md").read_text(encoding="utf-8")
RUNTIMES = {"torch", "onnxruntime", "executorch"}
TEXT_LIBRARIES = {"tokenizers", "jinja2"}


def test_all_is_what_an_application_imports() -> None:
    assert set(runtime_ref.__all__) == NAMES
    assert len(runtime_ref.__all__) == len(NAMES)
    assert set(dir(runtime_ref)) >= NAMES


def test_no_other_name_is_public() -> None:
    """Submodules become attributes when they are imported; apart from these there is what the module itself imports."""
    public = {name for name, value in vars(runtime_ref).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public <= NAMES | {"Any", "TYPE_CHECKING"}
    assert not hasattr(runtime_ref, "GraphEngine")


def test_every_name_and_member_has_a_docstring() -> None:
    assert runtime_ref.__doc__
    for name in NAMES:
        value = getattr(runtime_ref, name)
        assert value.__module__.startswith("runtime_ref."), name
        assert value.__doc__, name
        members = vars(value).items() if inspect.isclass(value) else ()
        for member, item in members:
            if not member.startswith("_") and (inspect.isfunction(item) or isinstance(item, property)):
                assert item.__doc__, f"{name}.{member}"


def test_readme_imports_only_these() -> None:
    imported = set()
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("runtime_ref"):
                assert node.module == "runtime_ref", block
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("runtime_ref") for alias in node.names), block
    assert imported
    assert imported <= NAMES


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_loads_no_runtime() -> None:
    assert not modules_after("from runtime_ref import *") & RUNTIMES


def test_submodules_do_not_load_all_of_it() -> None:
    assert not modules_after("import runtime_ref, runtime_ref.decoder") & (RUNTIMES | TEXT_LIBRARIES)
