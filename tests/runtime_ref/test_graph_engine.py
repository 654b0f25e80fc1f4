"""What every backend's graphs do with the cache they are given."""

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest


def test_cache_is_written_in_place(backend: str, bundle: Callable[..., Path]) -> None:
    """A pass writes the rows from `position` on into the host's own buffers, and touches no other."""
    path = bundle("e4b", backend)
    engine = load_engine(path, read_manifest(path), threads=1)
    engine.run_target([3, 4, 5], [2])
    for buffer in engine.cache.values():
        assert np.abs(buffer[:, :3]).min() > 0
        buffer[:, 3:] = 9.0
    before = {name: buffer.copy() for name, buffer in engine.cache.items()}
    engine.position = 3
    engine.run_target([6, 7], [0, 1])
    for name, buffer in engine.cache.items():
        untouched = [row for row in range(buffer.shape[1]) if row not in (3, 4)]
        assert np.array_equal(buffer[:, untouched], before[name][:, untouched])
        assert not (buffer[:, 3:5] == 9.0).any()


def test_a_row_is_computed_alike_in_every_pass(backend: str, bundle: Callable[..., Path]) -> None:
    """Logits of a token do not depend on what is verified with it: on ExecuTorch on x86-64 to the last bit."""
    path = bundle("e2b", backend)
    engine = load_engine(path, read_manifest(path), threads=1)
    engine.run_target(list(range(20)), [19])
    tokens = [7, 9, 11, 13, 15]
    engine.position = 20
    together, ids, _ = engine.run_target(tokens, range(5))
    for i, token in enumerate(tokens):
        engine.position = 20 + i
        alone, alone_ids, _ = engine.run_target([token], [0])
        if backend == "executorch" and platform.machine() == "x86_64":
            assert np.array_equal(alone[0], together[i])
            assert np.array_equal(alone_ids[0], ids[i])
        assert np.abs(alone[0] - together[i]).max() < 1e-5


def test_threads_of_a_pool_in_use_are_not_changed(bundle: Callable[..., Path]) -> None:
    """ExecuTorch frees the old pool, and a program that still points to it would crash."""
    path = bundle("dense", "executorch")
    engine = load_engine(path, read_manifest(path), threads=1)
    with pytest.raises(InputError, match=r"asked for 2 threads while another bundle is loaded with 1"):
        load_engine(path, read_manifest(path), threads=2)
    assert len(engine.run_target([3], [0])) == 3


def test_threads_are_counted_from_one(backend: str, bundle: Callable[..., Path]) -> None:
    path = bundle("dense", backend)
    with pytest.raises(InputError, match=r"threads is 0, expected at least 1"):
        load_engine(path, read_manifest(path), threads=0)
