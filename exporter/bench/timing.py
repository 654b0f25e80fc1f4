"""Timing of calls that are compared with each other: they run in turns, within one run, on a named machine."""

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name")


def machine() -> str:
    """Return the names of the processor and the operating system, to be printed with every measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {platform.system()}"


def milliseconds(
    calls: Mapping[Name, Callable[[], object]], rounds: int = 8, repeats: int = 20
) -> dict[Name, tuple[float, float]]:
    """Time short calls.

    The calls take turns, so that other load on the machine affects all of them alike.

    Args:
        calls: functions without arguments, by name.
        rounds: how many turns each call gets.
        repeats: how often a call is timed in one turn, after one that is not timed and fills the caches.

    Returns:
        Median and minimum of each call, in milliseconds, by name.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # brings its weights back to the caches
            for _ in range(repeats):
                started = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: (statistics.median(measured), min(measured)) for name, measured in times.items()}


def turns(seconds: float, min_turns: int, max_turns: int) -> Iterator[int]:
    """Count turns, from 0 on, until a budget of seconds is spent: at least `min_turns`, at most `max_turns`."""
    until = time.perf_counter() + seconds
    for turn in range(max_turns):
        if turn >= min_turns and time.perf_counter() > until:
            return
        yield turn


def in_turns(
    calls: Mapping[Name, Callable[[], object]], seconds: float, min_turns: int = 3, max_turns: int = 200
) -> dict[Name, list[float]]:
    """Time long calls, for which `milliseconds` would take minutes.

    Every turn runs each call once, in a new order, so that no call always finds the processor's caches as the same
    other call left them.

    Args:
        calls: functions without arguments, by name.
        seconds: time budget in seconds for each call; the turns end when that of all calls together is spent.
        min_turns: turns that are run even if the budget is spent.
        max_turns: turns after which timing ends even if the budget is not spent.

    Returns:
        Milliseconds of each turn, by name.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    for _ in turns(seconds * len(calls), min_turns, max_turns):
        shuffle(order)
        for name, call in order:
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Summarize times of any unit: `median`, lower `quartile`, `min` and `count`."""
    quartile = sorted(times)[(len(times) - 1) // 4]
    return {"median": statistics.median(times), "quartile": quartile, "min": min(times), "count": len(times)}
