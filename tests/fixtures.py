"""Fixtures that many tests share: pairs and bundles, made once in a session, and the command line."""

import functools
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl
import torch
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from exporter.cli import main as cli
from exporter.cli.schemas import document_schema
from exporter.demo import PAIR
from exporter.graphs import onnx
from exporter.graphs.backend import BACKENDS
from exporter.parity import stages
from exporter.quantization.recipes import RECIPES
from exporter.texts.token_texts import TokenTexts
from tests.chats import save_chat_pair
from tests.conftest import Directories, Run
from tests.exports import export
from tests.kept import keeping_traces, kept_bundle, kept_documents
from tests.pairs import SHAPES, save_pair

torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)
torch.set_grad_enabled(False)

OPEN = ("doctor", "inspect")  # commands whose documents have keys that depend on what was measured


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, each of which would look at half a million objects.

    With Python's threshold of 700 new objects, collections take 4 to 6 percent of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark tests with `executorch` among their parameters as `lowering`, and keep those of a bundle in one process.

    Another process would wait for the bundle while the first one makes it. A test that has neither a shape nor a recipe
    among its parameters uses the bundle `odd`, or says which with `xdist_group`.
    """
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        values = (part for value in parameters for part in (value if isinstance(value, tuple) else (value,)))
        words = {value for value in values if isinstance(value, str)}
        if "executorch" in words:
            item.add_marker(pytest.mark.lowering)
        if item.get_closest_marker("lowering") and not item.get_closest_marker("xdist_group"):
            names = words & set(SHAPES) or words & {*RECIPES} - {"fp32"} or {"odd"}
            item.add_marker(pytest.mark.xdist_group(f"lowering {min(names)}"))
    yield
    for item in items:
        # pytest-xdist 3.8 adds the group to `_nodeid`, which pytest 9.2 does not read any more.
        if (with_group := getattr(item, "_nodeid", item.nodeid)) != item.nodeid:
            item._id = type(item._id).parse(with_group)  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def kept_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Trace each ONNX graph once: tracing takes nearly all of the time of a small export."""
    directory = request.config.cache.mkdir("traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "trace_graph", keeping_traces(onnx.trace_graph, directory))
        yield


@pytest.fixture(scope="session")
def pair_dirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Directories]]:
    """Make the pair of a shape: directories of target and drafter. `demo` is the built-in pair.

    A test that changes one, which others use after it, is an error at the end.
    """
    made: dict[Path, int] = {}

    @functools.cache
    def make(name: str) -> Directories:
        demo = PAIR / "target", PAIR / "drafter"
        pair = demo if name == "demo" else save_pair(SHAPES[name], tmp_path_factory.mktemp(name))
        made.update({path: path.stat().st_mtime_ns for directory in pair for path in directory.iterdir()})
        return pair

    yield make
    changed = [str(path) for path, time in made.items() if not path.exists() or path.stat().st_mtime_ns != time]
    assert not changed, "a test changed a pair that others use: let it work on a copy"


@pytest.fixture(scope="session")
def bundle(
    request: pytest.FixtureRequest,
    pair_dirs: Callable[[str], Directories],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Make the bundle of a shape, backend and recipe. Tests must not change it; they work on a copy.

    `kmeans` is the shape `dense` with new clusters, whose number does not divide its vocabulary. A test that asks for
    `executorch` has that word among its parameters, or the marker `lowering`.
    """
    directory = tmp_path_factory.mktemp("bundles")
    lowering = any(item.get_closest_marker("lowering") for item in request.session.items)

    @functools.cache
    def make(name: str, backend: str, recipe: str) -> Path:
        assert lowering or backend != "executorch", "mark the test with `lowering`: its bundle takes minutes"
        shape, clusters = ("dense", 48) if name == "kmeans" else (name, None)
        arguments = *pair_dirs(shape), backend, recipe, clusters
        kept = kept_bundle(request.config.cache.mkdir("bundles"), lambda path: export(path, *arguments), *arguments)
        # A copy for this session: measured costs are saved beside it.
        return Path(shutil.copytree(kept, directory / f"{name}-{backend}-{recipe}"))

    return lambda name, backend="onnx", recipe="fp32": make(name, backend, recipe)


@pytest.fixture(scope="session")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Directories of a target and a drafter with turn tokens and a chat template."""
    return save_chat_pair(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def chat_bundle(chat_pair: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX bundle of `chat_pair`."""
    return export(tmp_path_factory.mktemp("chat") / "bundle", *chat_pair, "onnx")


@pytest.fixture(scope="session")
def documents(request: pytest.FixtureRequest) -> tuple[list[str], list[str]]:
    """The texts that the built-in pair was trained on, and those that were held out: reading them takes seconds."""
    return kept_documents(request.config.cache.mkdir("texts"))


@pytest.fixture
def few_held_out_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `parity` and `report` compare on the beginnings of a few held-out texts: prose, code and a chat."""
    real = stages.token_texts

    def few(*arguments: Any, **options: Any) -> TokenTexts:
        texts = real(*arguments, **options)
        return replace(texts, texts=tuple(text[:48] for text in texts.texts[::6]), kinds=texts.kinds[::6])

    monkeypatch.setattr(stages, "token_texts", few)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Run a test with each backend."""
    return request.param


@functools.cache
def document_validator(command: str) -> Validator:
    """Return what checks the documents of a command against its schema."""
    schema = document_schema(command, strict=command not in OPEN)
    return validator_for(schema)(schema)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, standard output and standard error.

    What `--json` prints must fulfil its schema.
    """

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gemma-mtp-export", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        if "--json" in arguments and captured.out:
            document_validator(str(arguments[0])).validate(json.loads(captured.out))
        return code, captured.out, captured.err

    return call
