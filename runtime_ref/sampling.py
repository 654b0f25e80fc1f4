"""Choose a token from the target's largest logits, with noise that belongs to the position and not to the call."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime_ref.errors import InputError

MAX_TOP_K = 64  # logits that a bundle's target gives for each position
GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment
_MASK = (1 << 64) - 1


class Chooser(Protocol):
    """What chooses the tokens of a text, one after the other. `Sampling` is one, `rules.RuledChooser` another."""

    def pick(self, logits: np.ndarray, ids: np.ndarray, state: np.ndarray, position: int) -> tuple[int, float]:
        """Choose the next token of the text, which counts as part of it from now on.

        Args:
            logits: [k] float32, the target's largest, in falling order.
            ids: [k] int64, their token ids.
            state: [E] float32, the target's state of the same row.
            position: index of the token in the whole text, prompt included.

        Returns:
            The token's id, and the natural logarithm of its probability for the target (`log_probabilities`).
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy. It has no history: each choice depends on its row alone.

    Attributes:
        temperature: divides the logits, 0 or more; 0 is greedy.
        top_p: keep the most likely tokens whose probabilities together reach it, more than 0 and at most 1; 1 keeps
            every one of the `top_k`.
        seed: of the noise, 0 to 2**64 - 1.
        top_k: how many of the largest logits are kept, 1 to `MAX_TOP_K`.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = MAX_TOP_K

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}, expected more than 0 and at most 1")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise InputError(
                f"top-k is {self.top_k}, expected 1 to {MAX_TOP_K}: a bundle gives no more logits of a token"
            )
        if not 0 <= self.seed <= _MASK:
            raise InputError(f"seed is {self.seed}, expected 0 to 2**64 - 1")

    def pick(self, logits: np.ndarray, ids: np.ndarray, state: np.ndarray, position: int) -> tuple[int, float]:
        """Choose a token by `choose`, as `Chooser.pick`."""
        rank = choose(logits, position, self)
        return int(ids[rank]), float(log_probabilities(logits)[rank])


@dataclass(frozen=True)
class Displaced:
    """Chooses tokens of a text whose oldest tokens were left out, by their positions in the whole text.

    Attributes:
        chooser: chooses the tokens.
        dropped: how many tokens were left out.
    """

    chooser: Chooser
    dropped: int

    def pick(self, logits: np.ndarray, ids: np.ndarray, state: np.ndarray, position: int) -> tuple[int, float]:
        """Choose a token, as `Chooser.pick`; `position` counts the tokens that stayed."""
        return self.chooser.pick(logits, ids, state, position + self.dropped)


def uniform(seed: int, position: int) -> float:
    """Return the noise for the token at a position: the top 24 bits of SplitMix64 (Steele, Lea & Flood 2014).

    The same seed and position give the same number in every call, so a token does not depend on whether it was drafted.

    Args:
        seed: 0 to 2**64 - 1.
        position: index of the token in the whole text, prompt included.

    Returns:
        A multiple of 2**-24 in [0, 1).
    """
    x = ((seed ^ (position * GOLDEN_GAMMA)) + GOLDEN_GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return float((x ^ (x >> 31)) >> 40) / 2**24


def choose(logits: np.ndarray, position: int, sampling: Sampling) -> int:
    """Choose a token from the largest logits of its position.

    Greedy takes the first. Sampling takes the first whose cumulative probability, after temperature, the top-k cut and
    the top-p cut, exceeds the position's noise. Probabilities are float64.

    Args:
        logits: [k] float32, in falling order.
        position: index of the token in the whole text, prompt included.
        sampling: temperature, cuts and seed.

    Returns:
        The index of the token in `logits`.
    """
    if sampling.temperature == 0.0:
        return 0
    behind = logits[: sampling.top_k].astype(np.float64) - float(logits[0])
    with np.errstate(over="ignore"):  # a tiny temperature sends everything but the first to minus infinity
        weights = np.exp(behind / sampling.temperature)
    cumulative = np.cumsum(weights / weights.sum())
    kept = cumulative[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]
    chosen = int(np.searchsorted(kept / kept[-1], uniform(sampling.seed, position), side="right"))
    return min(chosen, len(kept) - 1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return natural logarithms of the probabilities of the largest logits, at temperature 1.

    Smaller logits are not known and count as nothing, so the probabilities are a little too high.

    Args:
        logits: [.., k] float32, in falling order.

    Returns:
        [.., k] float64.
    """
    behind = logits.astype(np.float64) - logits[..., :1]
    return behind - np.log(np.exp(behind).sum(-1, keepdims=True))
