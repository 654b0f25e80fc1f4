"""Pairs and bundles that many tests share, made once a session."""

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
    """Target and drafter directory of a shape; `demo` is the built-in pair."""

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
    """The bundle of a shape, backend and recipe; tests that change one work on a copy.

    `kmeans` is the shape `dense` with clusters of its own, in a number that does not divide its vocabulary.

    Lowering to ExecuTorch takes a minute each, so a whole run makes all of those at once, in processes of their own.
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

        if len(request.session.items) > 200:
            for name in ("dense", "e4b", "demo", "kmeans", *SHAPES):
                lowered(name, "fp32")
            lowered("e2b", "int4")
        yield lambda name, backend="onnx", recipe="fp32": make(name, backend, recipe)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Target and drafter with turn tokens and a chat template."""
    return save_chat_pair(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def chat_bundle(chat_pair: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their ONNX bundle."""
    return export(*chat_pair, tmp_path_factory.mktemp("chat") / "bundle", "onnx")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line: exit code, standard output, standard error."""

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
