"""Fixtures that many tests share: pairs and bundles, made once in a session, and the command line."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import threadpoolctl
import torch

from exporter.cli import main as cli
from exporter.demo import PAIR
from exporter.graphs.backend import BACKENDS
from tests.chats import save_chat_pair
from tests.exports import export
from tests.pairs import SHAPES, save_pair

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)
torch.set_grad_enabled(False)

Directories = tuple[Path, Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def pair_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Directories]:
    """Make the pair of a shape: directories of target and drafter. `demo` is the built-in pair."""

    @functools.cache
    def make(name: str) -> Directories:
        if name == "demo":
            return PAIR / "target", PAIR / "drafter"
        return save_pair(SHAPES[name], tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session")
def bundle(
    request: pytest.FixtureRequest,
    pair_dirs: Callable[[str], Directories],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Path]]:
    """Make the bundle of a shape, backend and recipe. Tests must not change it; they work on a copy.

    `kmeans` is the shape `dense` with new clusters, whose number does not divide its vocabulary.

    Lowering a pair to ExecuTorch takes a minute, so a run of the whole suite lowers all pairs in two other processes
    while the first tests run.
    """
    directory = tmp_path_factory.mktemp("bundles")

    def arguments(name: str, backend: str, recipe: str) -> tuple[Path, Path, Path, str, str, int | None]:
        shape, clusters = ("dense", 48) if name == "kmeans" else (name, None)
        return *pair_dirs(shape), directory / f"{name}-{backend}-{recipe}", backend, recipe, clusters

    with ProcessPoolExecutor(2, get_context("spawn")) as pool:

        @functools.cache
        def lowered(name: str, recipe: str) -> Future[Path]:
            return pool.submit(export, *arguments(name, "executorch", recipe))

        @functools.cache
        def make(name: str, backend: str, recipe: str) -> Path:
            if backend == "executorch":
                return lowered(name, recipe).result()
            return export(*arguments(name, backend, recipe))

        items = request.session.items
        if len(items) > 200 and any("executorch" in item.name for item in items):
            for name in ("dense", "e4b", "demo", "kmeans", *SHAPES):
                lowered(name, "fp32")
            lowered("e2b", "int4")
        yield lambda name, backend="onnx", recipe="fp32": make(name, backend, recipe)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Directories of a target and a drafter with turn tokens and a chat template."""
    return save_chat_pair(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def chat_bundle(chat_pair: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX bundle of `chat_pair`."""
    return export(*chat_pair, tmp_path_factory.mktemp("chat") / "bundle", "onnx")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Run a test with each backend."""
    return request.param


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gemma-mtp-export", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
