"""How much memory a process can still take: the machine's, and less in a container with a limit. Linux only."""

import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def available_memory() -> int | None:
    """Return the bytes of memory, swap included, that this process can still take; None if that is not known."""
    found = [size for size in (_of_machine(), *_of_control_groups()) if size is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        text = (_ROOT / "proc/meminfo").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    available_kib = re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB", text, re.M)
    return sum(map(int, available_kib)) * 1024 if available_kib else None


def _of_control_groups() -> Iterator[int | None]:
    """What is left of each limit on the way from this process's control group up to the root, versions 2 and 1."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    mounted = _ROOT / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if not colon:
            continue
        if not controllers:  # version 2
            top, names = mounted, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # A container may see its own group as the root of what is mounted, but be told the host's path.
        path = top / group.lstrip("/")
        for directory in (path, *path.parents):
            if directory.is_relative_to(top):
                yield _left(directory, *names)


def _left(directory: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    """What a group may still take; pages of files that it has read or mapped are given back when others are needed."""
    try:
        limit = (directory / limit_name).read_text(encoding="ascii").strip()
        usage = int((directory / usage_name).read_text(encoding="ascii"))
        stat = (directory / "memory.stat").read_text(encoding="ascii")
        cache = sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.M)))
        return None if limit == "max" else max(0, int(limit) - usage + cache)
    except (OSError, ValueError):
        return None
