"""Free space before an export, leftovers of killed exports, and reading tensors from checkpoint files."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter import files
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint import tensors as checkpoint
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.tensors import Checkpoint
from exporter.graphs.parts import graph_parts
from exporter.quantization.recipes import RECIPES
from runtime_ref.errors import InputError

Pairs = Callable[[str], tuple[Path, Path]]


def test_too_little_disk_is_reported_with_the_sizes(
    pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    with pytest.raises(InputError, match=r"b: needs \d+\.\d kB of disk, 100\.0 kB are free; free some space"):
        export_bundle(open_pair(*pair_dirs("dense")), tmp_path / "b", ExportOptions("onnx", "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_reported_with_the_sizes(
    pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2000000 kB\nMemAvailable:   90000 kB\n")
    monkeypatch.setattr(files, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(InputError, match=r"needs about 700\.0 MB of memory, 92\.2 MB are free; close other"):
        export_bundle(open_pair(*pair_dirs("dense")), tmp_path / "b", ExportOptions("onnx", "fp32"))


def test_the_estimate_of_disk_is_close(bundle: Callable[..., Path], pair_dirs: Pairs) -> None:
    """Weights are nearly all of a large bundle; in this tiny one rows are padded as well."""
    for recipe in ("fp32", "int4"):
        parts = graph_parts(open_pair(*pair_dirs("demo")), RECIPES[recipe])
        stored = sum(file.stat().st_size for file in bundle("demo", "onnx", recipe).glob("*.weights"))
        assert 0.9 < sum(part.stored_bytes for part in parts.values()) / stored < 1.05


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    """An output that it was replacing comes back; leftovers of a running process or another machine stay."""
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = socket.gethostname()
    dead, kept = f"{int(killed.stdout)}@{host}", [f".b.partial-{os.getpid()}@{host}-x", ".b.partial-1@elsewhere-x"]
    for name in (f".b.partial-{dead}-x", f".b.partial-{dead}-y-old", f".b.partial-{10**30}@{host}-x", *kept):
        (tmp_path / name).mkdir()
    (tmp_path / f".b.partial-{dead}-y-old" / "file").write_text("old")
    files.remove_leftovers(tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "old"
    with files.replacing(tmp_path / "b") as partial:
        (partial / "file").write_text("whole")
    assert (tmp_path / "b" / "file").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "b"])


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(pair_dirs: Pairs, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((pair_dirs("dense")[1] / "model.safetensors").read_bytes())
    opened = Checkpoint(tmp_path)
    name = "model.embed_tokens.weight"
    opened.load(name)
    os.utime(file, ns=(1, 1))
    with pytest.raises(InputError, match=r"model.safetensors: changed while it was read"):
        opened.load(name)


def test_reading_in_blocks_gives_the_whole_tensor(pair_dirs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows and whole tensors, in float and integer dtypes."""
    for directory in pair_dirs("demo"):
        opened = Checkpoint(directory)
        for name in opened.entries:
            mapped = opened.map(name)
            expected = mapped.float() if mapped.is_floating_point() else mapped
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "BLOCK_BYTES", 1000)
                assert torch.equal(opened.load(name), expected), name
            assert torch.equal(opened.load(name), expected), name
