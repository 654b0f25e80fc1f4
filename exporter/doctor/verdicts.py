"""When a difference counts: the thresholds of `exporter.doctor.diagnosis`, each with its reason."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exporter.parity.stages import CEILING, EAGER_FACTOR

PASS, FINDING, SKIPPED = "pass", "finding", "skipped"

# Error of float32 sums in another order, relative to a row's length. Ten times what parity allows of an output's
# largest number, since a row may be short.
FLOOR = 1e-3

# A counterfactual must accept this much more of the drafts, on the same text: less is not why acceptance is low.
POINTS = 0.05

# And this many standard errors over texts. A dozen counterfactuals are tried on a dozen texts: with 3 one healthy
# pair in ten would have a finding by chance (Student's t), with 4 one in fifty.
ERRORS = 4
MIN_TEXTS = 5  # below which a standard error over texts means nothing

# A fault is judged by rows that it moves further than rounding does. There the bundle fits it if it is closer to it by
# this factor than to what is right, which also is what its own rounding makes of a fault that is as large.
CLOSER = 0.5**0.5


@dataclass(frozen=True)
class Experiment:
    """One row of the doctor's table. `verdict` is pass, finding or skipped, `figures` are what `detail` says."""

    experiment: str
    verdict: str
    detail: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """Which of several variants the found values are closest to: None if to the right ones.

    Attributes:
        limit: how far they may be.
        error: how far they are from the right ones, root mean square of rows, each relative to the right one's length.
        best_error: how far from the best variant.
        moved: of each variant, in rows that it changes, how far it is from the right one, and how far the found values
            are; left out where it changes nothing.
    """

    best: str | None
    limit: float
    error: float
    best_error: float
    moved: dict[str, tuple[float, float]]

    def shows(self, name: str) -> bool:
        """Whether a variant differs by more than rounding."""
        difference, away = self.moved[name]
        return difference >= CLOSER * away


def best_fit(found: Tensor, right: Tensor, variants: Mapping[str, Tensor], limit: float) -> Fit:
    """Compare found values [rows, E] with the right ones and with each variant.

    A variant is judged by the median of the rows that it changes: where activations are rounded a few rows are far off.
    """
    noise = distances(found, right, right)
    error, best, best_error = mean(noise), None, math.inf
    moved = {}
    for name, variant in variants.items():
        difference, off = distances(variant, right, right), distances(found, variant, right)
        changed = difference > 1e-6
        if not changed.any():
            continue
        size, away, closer = (float(part[changed].median()) for part in (difference, noise, off))
        moved[name] = (size, away)
        is_near = closer < CLOSER * away and closer <= max(limit, away / 3)
        if size >= CLOSER * away and is_near and mean(off) < best_error:
            best, best_error = name, mean(off)
    return Fit(best, limit, error, best_error, moved)


def distances(a: Tensor, b: Tensor, right: Tensor) -> Tensor:
    """Between rows of two [rows, E], relative to the length of the right one's."""
    return (a - b).norm(dim=1) / right.norm(dim=1).clamp(min=1e-30)


def allowed(eager: float) -> float:
    """Largest relative error allowed of a bundle, where rounding activations alone makes an error of `eager`."""
    return min(max(FLOOR, EAGER_FACTOR * eager), CEILING)


def gain(right: Sequence[Tensor], other: Sequence[Tensor], steps: int) -> tuple[float, float]:
    """How much more of the drafts another variant accepts, and the standard error of that.

    Args:
        right, other: accepted drafts of each round [T], by text.
        steps: drafts a round.

    Rounds of one text are alike, so that texts count, not rounds.
    """
    counts = torch.tensor([float(len(rounds)) for rounds in right])
    sums = torch.stack([(b - a).sum() for a, b in zip(right, other, strict=True)]).double() / steps
    more, texts = float(sums.sum() / counts.sum()), len(counts)
    spread = ((sums - more * counts) ** 2).sum() * texts / max(texts - 1, 1)
    return more, float(spread.sqrt() / counts.sum())


def is_clear(more: float, standard_error: float, texts: int) -> bool:
    return texts >= MIN_TEXTS and more > POINTS and more > ERRORS * standard_error


def stored_as(rows: Iterable[Tensor]) -> str | None:
    """The narrower float that holds every number of a cache's rows exactly: chance does not make that."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(part.any() and part.to(dtype).float().equal(part) for part in rows):
            return str(dtype).removeprefix("torch.")
    return None


def mean(errors: Tensor) -> float:
    """Root mean square."""
    return float(errors.square().mean().sqrt())
