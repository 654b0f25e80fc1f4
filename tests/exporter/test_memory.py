"""Available memory is the machine's, or what the limits of control groups leave."""

from pathlib import Path

import pytest

from exporter import memory

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system in which 900 MiB are available, and 100 of swap."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    write(tmp_path / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {900 << 10} kB\nSwapFree: {100 << 10} kB\n")
    return tmp_path


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(content))


def group(directory: Path, limit: object, usage: int, cache: int = 0, version: int = 2) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        write(directory / name, value)
    prefix = "" if version == 2 else "total_"
    files = f"{prefix}inactive_file {cache - cache // 3}\n{prefix}active_file {cache // 3}\n"
    write(directory / "memory.stat", f"anon 5\ninactive_anon 7\n{files}")


def test_without_groups(root: Path) -> None:
    assert memory.available_memory() == 1000 * MIB


def test_a_machine_that_does_not_tell(root: Path) -> None:
    (root / "proc/meminfo").unlink()
    assert memory.available_memory() is None


@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_a_limit_of_version_2(path: str, root: Path) -> None:
    """A container that sees its own group as the root may be told the host's path."""
    write(root / "proc/self/cgroup", f"0::{path}\n")
    group(root / "sys/fs/cgroup", 500 * MIB, 300 * MIB, cache=50 * MIB)
    assert memory.available_memory() == 250 * MIB


def test_the_tightest_limit_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/a/b\n")
    group(root / "sys/fs/cgroup/a/b", "max", 0)
    group(root / "sys/fs/cgroup/a", 400 * MIB, 350 * MIB)
    assert memory.available_memory() == 50 * MIB


def test_a_limit_of_version_1(root: Path) -> None:
    write(root / "proc/self/cgroup", "7:pids:/\n5:cpu,memory:/docker/x\n")
    group(root / "sys/fs/cgroup/memory", 700 * MIB, 100 * MIB, cache=30 * MIB, version=1)
    assert memory.available_memory() == 630 * MIB
    group(root / "sys/fs/cgroup/memory/docker/x", 100 * MIB, 300 * MIB, version=1)
    assert memory.available_memory() == 0


@pytest.mark.parametrize("content", ["", "nonsense", "0:\n", "0::/\n"])
def test_what_cannot_be_read_does_not_count(content: str, root: Path) -> None:
    write(root / "proc/self/cgroup", content)
    write(root / "sys/fs/cgroup/memory.max", "many")
    assert memory.available_memory() == 1000 * MIB
