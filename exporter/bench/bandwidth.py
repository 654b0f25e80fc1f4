"""Memory read bandwidth of this machine, measured in the same run as the decode steps that are compared with it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bench.timing import in_turns

MAX_BUFFER_BYTES = 1 << 30  # much more than the processor's caches hold


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int, seconds: float) -> dict[str, Any]:
    """Measure how fast threads together read a buffer that no cache holds.

    Args:
        threads: number of threads; each computes the maximum of its own part of the buffer.
        seconds: time budget in seconds; the buffer is read at least three times, however long that takes.

    Returns:
        `median` and `max` of the rates in GB/s (10^9 bytes per second), their `count`, and `buffer_bytes`.
    """
    buffer = np.ones(min(MAX_BUFFER_BYTES, available_bytes() // 4) // 8, np.int64)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        milliseconds = in_turns({"read": lambda: list(pool.map(np.max, parts))}, seconds)["read"]
    rates = [buffer.nbytes / 1e6 / time for time in milliseconds]
    return {"median": float(np.median(rates)), "max": max(rates), "count": len(rates), "buffer_bytes": buffer.nbytes}


def available_bytes() -> int:
    """Return the bytes that can be allocated without swapping; where Linux does not report them, four full buffers."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else 4 * MAX_BUFFER_BYTES
