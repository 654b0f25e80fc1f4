"""A bundle's files are read once, and again where they may have changed."""

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime_ref import checked_files
from runtime_ref.checked_files import first_changed_file
from runtime_ref.device_folder import device_folder
from runtime_ref.engine import open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import Manifest, read_manifest


@pytest.fixture
def copy(bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that counts as written long ago."""
    monkeypatch.setattr(checked_files, "SETTLED_NANOSECONDS", -(10**9))
    return Path(shutil.copytree(bundle("tiny"), tmp_path / "bundle"))


@pytest.fixture
def read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, set[str]]]:
    """Return a function that checks the bundle, and returns the changed file and the names of those that were read."""
    names: set[str] = set()
    sha256 = checked_files.file_sha256

    def remembering(file: Path, *more: object) -> str:
        names.add(file.name)
        return sha256(file, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(checked_files, "file_sha256", remembering)

    def check(bundle: Path = copy, **options: bool) -> tuple[str | None, set[str]]:
        names.clear()
        return first_changed_file(bundle, manifest(bundle), **options), set(names)

    return check


def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def test_files_are_read_once(copy: Path, read: Callable[..., tuple[str | None, set[str]]]) -> None:
    every = {*manifest(copy).files}
    assert read() == (None, every)
    assert read() == (None, set())
    assert read(verify=True) == (None, every)
    assert read() == (None, set())
    shown: dict[str, int] = {}
    first_changed_file(copy, manifest(copy), lambda name, size: shown.update({name: size}))
    assert shown == {name: size for name, (size, _) in manifest(copy).files.items()}


def test_files_that_changed_are_read_again(copy: Path, read: Callable[..., tuple[str | None, set[str]]]) -> None:
    read()
    file = copy / "target.weights"
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # what ctime gives away
    assert read() == (file.name, {file.name})
    with pytest.raises(InputError, match=r"target\.weights: sha256 differs"):
        open_engine(copy)
    file.write_bytes(content)
    assert read() == (None, {file.name})
    assert read() == (None, set())
    replaced = copy / "replaced"
    shutil.copyfile(file, replaced)
    replaced.replace(file)
    assert read() == (None, {file.name})


def test_changes_through_a_mapping_are_seen(copy: Path, read: Callable[..., tuple[str | None, set[str]]]) -> None:
    """Until pages reach the disk, another store to one changes no time."""
    file = copy / "target.weights"
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        mapped[0] = mapped[0]
        assert read()[0] is None
        assert read() == (None, set())
        mapped[0] ^= 1
        assert read() == (file.name, {file.name})


def test_a_copy_of_bundle_and_record_is_read(copy: Path, read: Callable[..., tuple[str | None, set[str]]]) -> None:
    read()
    other = copy.with_name("other")
    for folder in (copy, device_folder(copy)):
        shutil.copytree(folder, other.with_name(folder.name.replace("bundle", "other")), copy_function=shutil.copy2)
    assert read(other) == (None, {*manifest(other).files})
    assert device_folder(other).is_dir()
    record = json.loads((device_folder(other) / checked_files.RECORD).read_text())
    before = json.loads((device_folder(copy) / checked_files.RECORD).read_text())
    assert record["files"].keys() == before["files"].keys()
    assert all(record["files"][name] != before["files"][name] for name in before["files"])


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1}', '{"version": 2, "files": {}}', "\0"])
def test_a_damaged_record_counts_for_nothing(
    content: str, copy: Path, read: Callable[..., tuple[str | None, set[str]]]
) -> None:
    read()
    (device_folder(copy) / checked_files.RECORD).write_text(content)
    assert read() == (None, {*manifest(copy).files})


def test_another_manifest_counts_as_another_bundle(
    copy: Path, read: Callable[..., tuple[str | None, set[str]]]
) -> None:
    read()
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(document | {"tool_version": "0.0"}))
    assert read() == (None, {*manifest(copy).files})


def test_what_was_written_just_now_is_not_recorded(
    copy: Path, read: Callable[..., tuple[str | None, set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_files, "SETTLED_NANOSECONDS", 10**15)
    every = {*manifest(copy).files}
    assert [read(), read()] == [(None, every)] * 2


def test_a_place_that_is_read_only_is_no_error(
    copy: Path, read: Callable[..., tuple[str | None, set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(30, "Read-only file system", "x")

    monkeypatch.setattr(checked_files, "write_whole", full)
    every = {*manifest(copy).files}
    assert [read(), read()] == [(None, every)] * 2
