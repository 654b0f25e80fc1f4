"""What every backend's graphs do with the cache in host memory."""

import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.graphs.backend import BACKENDS
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import SLIDE_ROWS, read_manifest
from runtime_ref.stats import Stats
from tests.exports import LOW_BIT_SHAPES
from tests.rows import assert_rows_are_exact, prefill


def test_cache_is_written_in_place(backend: str, bundle: Callable[..., Path]) -> None:
    """A pass writes the rows from `position` on into the host's own buffers, and touches no other."""
    path = bundle("odd", backend)
    engine = load_engine(path, read_manifest(path), threads=1)
    engine.extend([3, 4, 5], [2])
    for buffer in engine.cache.buffers.values():
        assert np.abs(buffer[:, :3]).min() > 0
        buffer[:, 3:] = 9.0
    before = {name: buffer.copy() for name, buffer in engine.cache.buffers.items()}
    engine.run_target([6, 7], [0, 1])
    for name, buffer in engine.cache.buffers.items():
        untouched = [row for row in range(buffer.shape[1]) if row not in (3, 4)]
        assert np.array_equal(buffer[:, untouched], before[name][:, untouched])
        assert not (buffer[:, 3:5] == 9.0).any()


def test_weights_in_another_directory_are_named(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Links to all files of a bundle are well, as in a cache of the Hugging Face Hub."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "one").mkdir()
    for file in bundle("tiny").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
        shutil.copy(file, tmp_path / "one")
    load_engine(tmp_path / "linked", manifest := read_manifest(bundle("tiny")), threads=1)
    weights = tmp_path / "one" / "target.weights"
    weights.unlink()
    weights.symlink_to(bundle("tiny") / weights.name)
    with pytest.raises(InputError, match=r"target.weights: is a link to another directory .* copy the file itself"):
        load_engine(weights.parent, manifest, threads=1)


@pytest.mark.parametrize(("machine", "multiple"), [("x86_64", 2), ("aarch64", 4), ("arm64", 4)])
def test_passes_are_padded_for_the_processor(
    machine: str, multiple: int, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for padding up to the last position, and it changes no token."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    path = bundle("e2b", "onnx")
    engine = load_engine(path, replace(read_manifest(path), eos=frozenset()), threads=1)
    passes = set()
    run = engine.graphs["target"].run

    def recorded(**inputs: np.ndarray) -> list[np.ndarray]:
        passes.update((len(inputs["embedded"]), len(inputs["output_rows"])))
        return run(**inputs)

    monkeypatch.setattr(engine.graphs["target"], "run", recorded)
    prompt = [3 + i % 200 for i in range(engine.manifest.max_seq_len - 43)]
    texts = [list(generate(engine, prompt, Options(100, drafts), Stats())) for drafts in (0, 3, 8)]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 43
    assert min(passes) == multiple
    assert {count % multiple for count in passes} == {0}


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [("onnx", "smallest"), *((backend, name) for backend in BACKENDS for name in ("fp32", "int8", "int4", "mixed"))],
)
def test_a_row_is_the_same_in_every_pass(backend: str, recipe: str, bundle: Callable[..., Path]) -> None:
    """Logits and state of a token are bitwise the same whatever is verified with it.

    From the first row on, across a growth of the cache and moves of the sliding layers' buffers. `smallest` on
    ExecuTorch is lowered once, calibrated: `test_parity_proves_a_calibrated_bundle`.
    """
    path = bundle("odd" if recipe == "fp32" else LOW_BIT_SHAPES.get((backend, recipe), "e2b"), backend, recipe)
    assert_rows_are_exact(path)


def test_sliding_buffers_move(backend: str, bundle: Callable[..., Path]) -> None:
    """They hold little more than the window, however long the text is, and rows keep their values when they move."""
    path = bundle("odd", backend)
    engine = load_engine(path, read_manifest(path), threads=1)
    manifest = engine.manifest
    text = np.random.default_rng(1).integers(0, manifest.vocab_size, manifest.max_seq_len).tolist()
    prefill(engine, text[:380])
    early = {name: buffer[:, 250:380].copy() for name, buffer in engine.cache.buffers.items()}
    start = engine.cache.window_start
    while engine.cache.window_start == start:
        engine.extend([text[engine.position]], [0])
    assert engine.cache.window_start % SLIDE_ROWS == 0
    for kv in manifest.kv:
        sliding = kv.layer_type == "sliding_attention"
        assert engine.cache.buffers[kv.name].shape[1] <= manifest.limits["window_rows" if sliding else "cache_rows"]
        first = engine.cache.window_start if sliding else 0
        kept = np.array([row for row in range(250, 380) if row >= first])
        assert len(kept) > 100
        assert np.array_equal(engine.cache.buffers[kv.name][:, kept - first], early[kv.name][:, kept - 250])
    assert engine.cache.window_start <= engine.position - manifest.sliding_window - 2


@pytest.mark.lowering
def test_threads_of_a_pool_in_use_are_not_changed(bundle: Callable[..., Path]) -> None:
    """ExecuTorch frees the old pool, and a program that points to it would crash."""
    path = bundle("odd", "executorch")
    engine = load_engine(path, read_manifest(path), threads=1)
    with pytest.raises(InputError, match=r"asked for 2 threads while another bundle is loaded with 1"):
        load_engine(path, read_manifest(path), threads=2)
    assert len(engine.run_target([3], [0])) == 3


def test_threads_are_counted_from_one(backend: str, bundle: Callable[..., Path]) -> None:
    path = bundle("odd", backend)
    with pytest.raises(InputError, match=r"threads is 0, expected 1 to 256"):
        load_engine(path, read_manifest(path), threads=0)
