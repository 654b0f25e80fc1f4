"""What commands load, and what they say where an extra of the package is not installed."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli.main import COMMANDS
from exporter.terminal import EXTRAS
from tests.conftest import Directories

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
# Importing a module that is None in sys.modules raises ModuleNotFoundError.
SCRIPT = """
import sys
sys.modules |= dict.fromkeys(sys.argv.pop(1).split(","))
from exporter.cli.main import main
main()
"""
HELP = f"""
import importlib, sys
for name in {list(COMMANDS)}:
    importlib.import_module(f"exporter.cli.{{name}}_command")
print(*sys.modules)
"""


def run_without(modules: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, ",".join(modules), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_loads_nothing_that_is_slow() -> None:
    loaded = set(
        subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {*EXTRAS, "onnxruntime", "tokenizers", "jinja2", "scipy", "resource"}


def test_extras_are_those_of_the_package() -> None:
    """Each module belongs to a distribution of its extra, and none to the base dependencies."""
    distributions = {"onnx_ir": "onnx-ir", "sklearn": "scikit-learn"}

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[=><]", requirement)[0] for requirement in requirements}

    for module, extra in EXTRAS.items():
        name = distributions.get(module, module)
        assert name in names(PROJECT["optional-dependencies"][extra])
        assert name not in names(PROJECT["dependencies"])


@pytest.mark.parametrize("command", [("generate", "--prompt", "Return the", "--max-new-tokens", 3), ("inspect",)])
def test_the_base_package_runs_bundles(command: tuple[object, ...], bundle: Callable[[str], Path]) -> None:
    result = run_without(list(EXTRAS), command[0], bundle("demo"), *command[1:])
    assert (result.returncode, "error" in result.stderr) == (0, False), result.stderr
    assert "Return the" in result.stdout or "total_bytes" in result.stdout


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        (
            list(EXTRAS),
            ("export", "--output", "b"),
            r"this command needs \w+, .* pip install 'gemma-mtp-export\[export\]'",
        ),
        (["onnx_ir"], ("export", "--output", "b"), r"--backend onnx: .*onnx_ir.* 'gemma-mtp-export\[all\]'"),
        (
            ["executorch"],
            ("export", "--output", "b", "--backend=executorch"),
            r"--backend executorch: .*No module named.*\[all\]'",
        ),
    ],
    ids=["export", "onnx", "executorch"],
)
def test_a_missing_extra_is_one_line(
    missing: list[str],
    arguments: tuple[str, ...],
    message: str,
    pair_dirs: Callable[[str], Directories],
    tmp_path: Path,
) -> None:
    target, drafter = pair_dirs("dense")
    arguments = tuple(str(tmp_path / word) if word == "b" else word for word in arguments)
    result = run_without(missing, *arguments, "--target", target, "--drafter", drafter)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert re.search(message, result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_runtime_is_one_line(bundle: Callable[..., Path], tmp_path: Path) -> None:
    result = run_without(["onnxruntime"], "generate", bundle("demo"), "--prompt", "a")
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: .*backend onnx cannot be imported \(.*\); pip install 'gemma-mtp-export'\n", result.stderr
    )


def test_a_missing_grammar_library_is_one_line(bundle: Callable[..., Path]) -> None:
    result = run_without(["llguidance"], "generate", bundle("demo"), "--prompt", "a", "--regex", "a")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"error: structured output needs llguidance, .*; pip install 'gemma-mtp-export\[grammar\]'\n", result.stderr
    )
