"""The divergence of two distributions over a vocabulary that is gone through in blocks."""

import torch
from torch import Tensor


class RunningDivergence:
    """KL(expected || actual) and kept choices at some positions, from logits that come in blocks of tokens."""

    def __init__(self, positions: int) -> None:
        self._max = torch.full((positions,), -torch.inf, dtype=torch.float64)
        self._weight, self._weighted_gap = (torch.zeros(positions, dtype=torch.float64) for _ in range(2))
        self._actual_sum = torch.full((positions,), -torch.inf, dtype=torch.float64)  # log of the sum of exponentials
        self._best = [(torch.full((positions,), -torch.inf), torch.zeros(positions, dtype=torch.int64))] * 2
        self._tokens = 0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Add the logits [positions, tokens] float32 of the tokens that follow."""
        for i, logits in enumerate((expected, actual)):
            (best, ids), (value, at) = self._best[i], logits.max(1)
            self._best[i] = torch.maximum(best, value), torch.where(value > best, at + self._tokens, ids)
        self._tokens += expected.shape[1]
        expected, actual = expected.double(), actual.double()
        largest = torch.maximum(self._max, expected.amax(1))
        before, weights = (self._max - largest).exp(), (expected - largest.unsqueeze(1)).exp()
        self._weight = self._weight * before + weights.sum(1)
        self._weighted_gap = self._weighted_gap * before + (weights * (expected - actual)).sum(1)
        self._actual_sum = torch.logaddexp(self._actual_sum, actual.logsumexp(1))
        self._max = largest

    @property
    def kl(self) -> float:
        """Mean over positions, in nats."""
        expected_sum = self._max + self._weight.log()
        return float((self._weighted_gap / self._weight - expected_sum + self._actual_sum).mean())

    @property
    def choices_kept(self) -> float:
        """Fraction of positions at which both have the same largest logit."""
        return float((self._best[0][1] == self._best[1][1]).double().mean())
