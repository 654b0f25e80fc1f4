"""Imports point one way, exporter -> clustering -> runtime_ref, and each package takes only what it is given."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "runtime_ref": {"numpy", "runtime_ref"},
    "clustering": {"numpy", "safetensors", "sklearn", "clustering", "runtime_ref"},
    "exporter": {
        *(
            "click",
            "executorch",
            "matplotlib",
            "numpy",
            "onnx_ir",
            "onnxruntime",
            "onnxscript",
            "rich",
            "safetensors",
            "sklearn",
            "tokenizers",
        ),
        *("torch", "torchao", "exporter", "clustering", "runtime_ref"),
    },
}
# The one file that may import a package that the rest of its folder may not.
ONLY_IN = {
    "executorch": {
        *("runtime_ref/graphs_executorch.py", "exporter/backends/executorch.py"),
        *("exporter/bench/programs.py", "exporter/bench/heads.py"),
    },
    "onnxruntime": {"runtime_ref/graphs_onnx.py", "exporter/backends/onnx.py", "exporter/bench/programs.py"},
    "onnx_ir": {"exporter/backends/onnx.py"},
    "onnxscript": {"exporter/backends/onnx.py"},
    "tokenizers": {"runtime_ref/tokenizer.py", "exporter/demo/tokenizer.py"},
    "sklearn": {"clustering/kmeans.py", "clustering/recall.py", "exporter/bench/clusters.py"},
    "torchao": {"exporter/backends/executorch.py", "exporter/bench/heads.py"},
    "jinja2": {"runtime_ref/chat.py", "exporter/report.py"},
    "matplotlib": {"exporter/plots.py", "exporter/report_figures.py"},
}
# ExecuTorch's Python runtime takes and gives torch tensors.
ALSO = {"runtime_ref/graphs_executorch.py": {"torch"}}
MODULES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]] | STANDARD
    allowed |= {package for package, files in ONLY_IN.items() if name in files}
    allowed |= ALSO.get(name, set())
    forbidden = {package for package, files in ONLY_IN.items() if name not in files}
    packages = {module.partition(".")[0] for module in imports(path)}
    assert packages <= allowed - forbidden
    assert "exporter.cli" not in imports(path)


def test_modules_stay_short() -> None:
    assert [str(path) for path in MODULES if len(path.read_text().splitlines()) > 400] == []
