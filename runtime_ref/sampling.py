"""Choosing a token from the target's largest logits, with noise that belongs to the position and not to the call."""

from dataclasses import dataclass

import numpy as np

from runtime_ref.errors import InputError

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_p 1 keeps every choice."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}, expected more than 0 and at most 1")


def uniform(seed: int, position: int) -> float:
    """Noise in [0, 1) for the token at a position: top 24 bits of SplitMix64 (Steele, Lea & Flood 2014).

    The same seed and position give the same number in every call, so that a token does not depend on whether it was
    drafted.
    """
    x = ((seed ^ (position * GOLDEN)) + GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return float((x ^ (x >> 31)) >> 40) / 2**24


def choose(logits: np.ndarray, ids: np.ndarray, position: int, sampling: Sampling) -> int:
    """Choose the token at `position` from its largest logits [k] float32, ordered, and their ids [k] int64.

    Greedy takes the first. Sampling takes the first whose cumulative probability, after temperature and the top-p cut,
    exceeds the position's noise.
    """
    if sampling.temperature == 0.0:
        return int(ids[0])
    behind = logits.astype(np.float64) - float(logits[0])
    with np.errstate(over="ignore"):  # a tiny temperature sends everything but the first to minus infinity
        weights = np.exp(behind / sampling.temperature)
    cumulative = np.cumsum(weights / weights.sum())
    kept = cumulative[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]
    chosen = int(np.searchsorted(kept / kept[-1], uniform(sampling.seed, position), side="right"))
    return int(ids[min(chosen, len(kept) - 1)])
