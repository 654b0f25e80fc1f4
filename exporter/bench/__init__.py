"""What `make bench` measures. Nothing here is a test: figures are ratios within one run, on the machine they name."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name")


def machine() -> str:
    """Processor and system, as a figure should name them."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {platform.system()}"


def milliseconds(
    calls: Mapping[Name, Callable[[], object]], rounds: int = 8, repeats: int = 20
) -> dict[Name, tuple[float, float]]:
    """Median and minimum of each call, in turns of `repeats`, so that what else the machine does hits all alike."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # brings its weights back to the caches
            for _ in range(repeats):
                started = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}
