"""Traces, bundles and texts that tests make once and keep in pytest's cache directory, named by what they depend on.

Exports are reproducible to the byte, so a kept one is what a new one would be. A fresh checkout has none. What no test
has used for a week is deleted; `pytest --cache-clear` deletes all of it.
"""

import ast
import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from filelock import FileLock
from torch import nn
from torch._subclasses import FakeTensorMode

from exporter.demo import corpus
from exporter.graphs.spec import GraphSpec
from exporter.modeling.layers import Ops

ROOT = Path(__file__).parents[1]
NO_FILE = "none"
TRACE_SOURCES = ("exporter/modeling", "exporter/graphs")
BUNDLE_SOURCES = (
    *("exporter/files.py", "exporter/quantization", "exporter/checkpoint", "exporter/bundle", "exporter/heads"),
    *(*TRACE_SOURCES, "exporter/parity", "clustering", "runtime_ref", "tests/exports.py"),
)
TRACE_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")
# The manifest has the versions of the last two.
BUNDLE_PACKAGES = (*TRACE_PACKAGES, "executorch", "torchao", "numpy", "scikit-learn", "onnxruntime", "gemma-mtp-export")

TraceGraph = Callable[[GraphSpec, Mapping[str, int], Callable[[], nn.Module]], ir.Model]


@contextmanager
def kept(path: Path) -> Iterator[bool]:
    """Yield whether a path has to be made, while no other process makes it; the block then makes it in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            path.touch()
        yield not path.exists()


def kept_bundle(directory: Path, make: Callable[[Path], object], *facts: object) -> Path:
    """Return a kept bundle.

    Args:
        directory: where bundles are kept.
        make: writes the bundle to a path.
        facts: what the bundle depends on besides the sources, such as options, and directories of checkpoints.
    """
    contents = (_contents(fact) if isinstance(fact, Path) else repr(fact) for fact in facts)
    path = directory / _digest(_sources(BUNDLE_SOURCES, BUNDLE_PACKAGES), *contents)
    with kept(path) as missing:
        if missing:
            make(path)
    return path


def kept_documents(directory: Path) -> tuple[list[str], list[str]]:
    """Return `exporter.demo.corpus.documents()`, whose texts depend on that module and on the version of Python."""
    path = directory / f"{_digest(_code(Path(corpus.__file__)), platform.python_version())}.json"
    with kept(path) as missing:
        if missing:
            (part := path.with_suffix(".part")).write_text(json.dumps(corpus.documents()))
            part.rename(path)
    training, held_out = json.loads(path.read_text())
    return training, held_out


def keeping_traces(trace_graph: TraceGraph, directory: Path) -> TraceGraph:
    """Return `exporter.graphs.onnx.trace_graph` as a function that keeps its results.

    Args:
        trace_graph: the function itself.
        directory: where traces are kept.
    """

    def trace(spec: GraphSpec, limits: Mapping[str, int], build: Callable[[], nn.Module]) -> ir.Model:
        with FakeTensorMode():
            structure = _structure(build())
        sources = _sources(TRACE_SOURCES, TRACE_PACKAGES)
        path = directory / f"{_digest(sources, repr(spec), repr(limits), structure)}.onnx"
        with kept(path) as missing:
            if missing:
                _save(trace_graph(spec, limits, build), part := path.with_suffix(".part"))
                part.rename(path)
        return _load(path)

    return trace


def _save(model: ir.Model, path: Path) -> None:
    """Write a model whose parameters have no values yet: they refer to a file that does not exist."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            value.const_value = ir.ExternalTensor(NO_FILE, 0, 0, value.dtype, shape=value.shape, name=name)
    ir.save(model, path)


def _load(path: Path) -> ir.Model:
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def _structure(module: nn.Module) -> str:
    """Describe all that a trace of a module depends on: code, types, names, shapes and settings of its parts."""
    lines, files = [], set()
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if key[0] != "_" and not isinstance(value, Ops)}
        assert all(_is_plain(value) for value in settings.values()), f"{type(part)}: {settings}"
        lines.append(f"{name} {type(part).__qualname__} {settings}")
        files |= {Path(inspect.getfile(base)) for base in type(part).__mro__ if base.__module__ != "builtins"}
    lines += [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in module.state_dict().items()]
    lines += [_code(file) for file in sorted(files) if ROOT in file.parents and ".venv" not in file.parts]
    return "\n".join(lines)


def _is_plain(value: object) -> bool:
    """Return whether `repr` gives all of a value."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str) or is_dataclass(value)


@cache
def _sources(places: tuple[str, ...], packages: tuple[str, ...]) -> str:
    """Digest the code of source files, and versions of packages."""
    files = sorted(file for place in places for file in ([ROOT / place, *(ROOT / place).rglob("*.py")]))
    return _digest(
        *(_code(file) for file in files if file.is_file()),
        *map(version, packages),
        platform.python_version(),
        platform.machine(),
    )


@cache
def _code(file: Path) -> str:
    """Return a module's code without comments and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        described = (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        )
        if described:
            node.body = node.body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree)


@cache
def _contents(directory: Path) -> str:
    """Digest the names and contents of a directory's files."""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    return _digest(*(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]
