"""Free space before an export, leftovers of killed exports, and reading tensors from checkpoint files."""

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exporter import files
from exporter.bundle.export import ExportOptions, check_output, export_bundle, plan_export
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
        export_bundle(open_pair(*pair_dirs("dense")), tmp_path / "b", ExportOptions("onnx", RECIPES["fp32"]))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_reported_with_the_sizes(
    pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "available_memory", lambda: 92_200_000)
    pair = open_pair(*pair_dirs("dense"))
    with pytest.raises(InputError, match=r"needs about 700\.0 MB of memory, 92\.2 MB are free; close other"):
        export_bundle(pair, tmp_path / "b", ExportOptions("onnx", RECIPES["fp32"]))
    plan_export(pair, tmp_path / "b", ExportOptions("onnx", RECIPES["fp32"], check_room=False))


def test_the_estimate_of_disk_is_close(bundle: Callable[..., Path], pair_dirs: Pairs) -> None:
    """Weights are nearly all of a large bundle; in this tiny one rows are padded as well."""
    for recipe in ("fp32", "int4"):
        parts = graph_parts(open_pair(*pair_dirs("demo")), RECIPES[recipe])
        stored = sum(file.stat().st_size for file in bundle("demo", "onnx", recipe).glob("*.weights"))
        assert 0.9 < sum(part.stored_bytes for part in parts.values()) / stored < 1.05


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    """An output that it was replacing comes back, and may not be replaced without being asked."""
    for name in (".b.partial-x", ".b.partial-y-old", ".b.partial-4711@host-z-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".b.partial-file").write_text("")
    (tmp_path / ".b.lock").write_text("")
    with pytest.raises(InputError, match="b: exists already"):
        check_output(tmp_path / "b", force=False)
    assert (tmp_path / "b" / "file").read_text() in (".b.partial-y-old", ".b.partial-4711@host-z-old")
    with files.replacing(tmp_path / "b") as partial:
        (partial / "file").write_text("whole")
    assert (tmp_path / "b" / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_live_writer_keeps_others_away(tmp_path: Path) -> None:
    """Whatever process, host or container they are: the lock is on a file beside the output."""
    with files.replacing(tmp_path / "b") as partial:
        (partial / "file").write_text("whole")
        for attempt in (lambda: files.recover(tmp_path / "b"), lambda: check_output(tmp_path / "b", force=True)):
            with pytest.raises(InputError, match="b: another process is writing it; wait until it ends"):
                attempt()
        with pytest.raises(InputError, match="another process is writing it"), files.replacing(tmp_path / "b"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_is_kept_stays_until_the_output_is_written(tmp_path: Path) -> None:
    """Beside it, for one process at a time."""
    output, kept = tmp_path / "new/b", tmp_path / "new/.b.kept"
    with pytest.raises(ZeroDivisionError), files.keeping(output):
        raise ZeroDivisionError
    assert not [*kept.parent.iterdir()]
    with pytest.raises(ZeroDivisionError), files.keeping(output) as directory:
        (directory / "a").write_text("finished")
        with pytest.raises(InputError, match="b: another process is writing it; wait until it ends"):
            files.keeping(output).__enter__()
        raise ZeroDivisionError
    assert [*kept.parent.iterdir()] == [kept]
    with files.keeping(output) as directory:
        assert (directory / "a").read_text() == "finished"
    assert not [*kept.parent.iterdir()]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/b: cannot be written"), files.keeping(tmp_path / "file/b"):
        pass


def test_files_of_bundles_and_checkpoints_are_not_replaced(
    bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path
) -> None:
    """By a report or a table, whatever is forced; other files beside them are."""
    bundle_dir = shutil.copytree(bundle("tiny"), tmp_path / "bundle")
    drafter = shutil.copytree(pair_dirs("tiny")[1], tmp_path / "drafter")
    for file in (bundle_dir / "manifest.json", bundle_dir / "target.weights", drafter / "model.safetensors"):
        with pytest.raises(InputError, match="is one of the files of a bundle or a checkpoint; choose another file"):
            files.check_file(file, force=True)
    for file in (bundle_dir / "report.html", drafter / "clusters", tmp_path / "manifest.json"):
        file.write_text("[]")
        files.check_file(file, force=True)


def test_a_mount_point_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="/: is a mount point, which cannot be replaced; choose a directory inside"):
        files.check_directory(Path("/"), True, lambda _: True, "a bundle")


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def check() -> None:
        files.check_directory(tmp_path / "b", False, lambda _: True, "a bundle")

    check()
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="exists already"), files.replacing(tmp_path / "b", check):
        pass


REPLACE = """
import sys
from pathlib import Path
from exporter import files
if sys.argv[2] == "by two renames":
    files._exchange = lambda *_: False
print("ready", flush=True)
for number in range(10**9):
    with files.replacing(Path(sys.argv[1])) as partial:
        for name in ("one", "two"):
            (partial / name).write_text(str(number))
"""


@pytest.mark.parametrize("how", ["by an exchange", "by two renames"])
def test_nothing_is_lost_when_a_writer_is_killed(how: str, tmp_path: Path) -> None:
    """Writers that replace an output all the time are killed at random moments; it is whole after each."""
    output, generator = tmp_path / "b", random.Random(0)
    with files.replacing(output) as partial:
        for name in ("one", "two"):
            (partial / name).write_text("first")
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", REPLACE, output, how], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout:
            writer.stdout.readline()
            threading.Event().wait(generator.random() / 20)
        writer.kill()
        writer.wait()
        if how == "by an exchange":
            assert (output / "one").exists()
        files.recover(output)
        assert (output / "one").read_text() == (output / "two").read_text()
        assert {path.name for path in tmp_path.iterdir()} <= {"b", ".b.lock"}


FOREIGN = (
    ".DS_Store",
    "._target.onnx",
    "Thumbs.db",
    "desktop.ini",
    ".directory",
    ".stfolder/x",
    "@eaDir/a/b",
    "Icon\r",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_file_managers_and_sync_tools_do_not_count(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "marker").write_text("{}")
    (tmp_path / name).write_text("")
    assert files.holds_only(tmp_path, "marker", lambda _: [])


OTHERS = (
    "notes.txt",
    ".git/config",
    ".env",
    "thumbs",
    "a/notes.txt",
    ".stversions/thesis.docx",
    ".hidden/thesis.docx",
    "._x/a.txt",
    ".Trash-1000/files/a.jpg",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "marker").write_text("{}")
    (tmp_path / name).write_text("")
    assert not files.holds_only(tmp_path, "marker", lambda _: [])


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
