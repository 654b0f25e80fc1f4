"""How fast this machine reads memory, measured in the run that it judges."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bench.timing import in_turns

BUFFER = 1 << 30  # bytes, much more than caches hold


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int, seconds: float) -> dict[str, Any]:
    """GB/s at which so many threads read a buffer that no cache holds: the largest of its numbers."""
    buffer = np.ones(min(BUFFER, available_bytes() // 4) // 8, np.int64)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        times = in_turns({"read": lambda: list(pool.map(np.max, parts))}, seconds)["read"]
    rates = [buffer.nbytes / 1e6 / time for time in times]
    return {"median": float(np.median(rates)), "max": max(rates), "count": len(rates), "buffer_bytes": buffer.nbytes}


def available_bytes() -> int:
    """Memory that can be had without swapping, where Linux says so; else enough for the whole buffer."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 4 * BUFFER
