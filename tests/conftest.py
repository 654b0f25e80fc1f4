"""Pairs and bundles that many tests share, made once a session."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.backends import BACKENDS
from exporter.bundle import ExportOptions, export_bundle
from exporter.demo import PAIR
from exporter.pair import open_pair
from tests.pairs import SHAPES, save_pair

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
torch.set_grad_enabled(False)

Directories = tuple[Path, Path]


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
def bundle(pair_dirs: Callable[[str], Directories], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The bundle of a shape and backend; tests that change one work on a copy."""

    @functools.cache
    def make(name: str, backend: str = "onnx") -> Path:
        output = tmp_path_factory.mktemp("bundles") / f"{name}-{backend}"
        export_bundle(open_pair(*pair_dirs(name)), output, ExportOptions(backend, max_seq_len=300))
        return output

    return make


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param
