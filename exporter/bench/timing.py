"""What `make bench` measures. Nothing here is a test: figures are ratios within one run, on the machine they name."""

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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


def turns(seconds: float, min_turns: int, max_turns: int) -> Iterator[int]:
    """Count turns, from 0 on, until a budget of seconds is spent: at least `min_turns`, at most `max_turns`."""
    until = time.perf_counter() + seconds
    for turn in range(max_turns):
        if turn >= min_turns and time.perf_counter() > until:
            return
        yield turn


def in_turns(
    calls: Mapping[Name, Callable[[], object]], seconds: float, least: int = 3, most: int = 200
) -> dict[Name, list[float]]:
    """Milliseconds of each call, one call a turn; for calls that take long, where `milliseconds` would take minutes.

    Turns end when `seconds` for each call have passed, but not before `least`, and not after `most` of them. Each has
    another order, so that no call always finds the processor's caches as the same other one left them.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    for _ in turns(seconds * len(calls), least, most):
        shuffle(order)
        for name, call in order:
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Median, lower quartile and minimum of times, and how many there are."""
    quartile = sorted(times)[(len(times) - 1) // 4]
    return {"median": statistics.median(times), "quartile": quartile, "min": min(times), "count": len(times)}
