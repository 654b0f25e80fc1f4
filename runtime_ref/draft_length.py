"""Choose K, the number of draft tokens, and their source before each round, for the most tokens a second.

A round of K drafts is expected to add 1 + the sum over i <= K of the probability that i drafts are accepted. Its time
is measured. Both are estimated while text is generated, so nobody has to know the best K for a text or a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime_ref.costs import DRAFTER, Costs

# Rounds after which an observation counts half, one estimate for each. The slow estimate is exact on steady text, the
# fast one follows a change; they are mixed by how well they predicted the latest rounds.
HALF_LIVES_ROUNDS = (8, 64)
# Factor, each round, on the log-likelihoods that say how well the estimates predicted.
SCORE_DECAY_PER_ROUND = 0.95

# Acceptance that is assumed of a draft before it is observed, and how many observations the assumption counts as. It is
# high, so that a K that was not tried lately is tried again: no other probe is needed.
PRIOR_ACCEPTANCE, PRIOR_OBSERVATIONS = 0.9, 2.0

# What drafting may lose against plain decoding: a fraction of the tokens, and passes at the start. Passes that it saved
# may be lost again, up to a maximum.
LOSS_PASSES_PER_TOKEN, INITIAL_LOSS_PASSES, MAX_SAVED_PASSES = 0.01, 2.0, 16.0

MAX_SAVED = 1e6  # no number that was learned is larger: counts fade, and a loss beyond it says no more


@dataclass(frozen=True)
class Plan:
    """The drafts of the next round.

    Attributes:
        source: `costs.DRAFTER`, a name of prompt lookup (`drafts.LOOKUP_SOURCES`), or `drafts.GRAMMAR`.
        num_draft_tokens: K, 0 for a plain pass.
    """

    source: str
    num_draft_tokens: int


class AcceptanceEstimate:
    """Estimates, for one source, how likely each draft of a round is accepted if those before it were.

    Attributes:
        reached: [1 + max_drafts] probabilities that the first i drafts are accepted, from i = 0 on.
    """

    def __init__(self, max_drafts: int) -> None:
        """Begin without observations.

        Args:
            max_drafts: the largest K of a round.
        """
        self._keep = [0.5 ** (1 / rounds) for rounds in HALF_LIVES_ROUNDS]
        self._accepted = [[0.0] * max_drafts for _ in HALF_LIVES_ROUNDS]
        self._rejected = [[0.0] * max_drafts for _ in HALF_LIVES_ROUNDS]
        self._scores = [0.0] * len(HALF_LIVES_ROUNDS)  # log-likelihoods of the latest rounds, by half-life
        self._estimate()

    def update(self, drafted: int, accepted: int) -> None:
        """Add the observations of a round.

        Args:
            drafted: how many drafts were judged; 0 only lets earlier observations fade.
            accepted: how many of them were right.
        """
        for i, chances in enumerate(self._chances):
            self._scores[i] *= SCORE_DECAY_PER_ROUND if drafted else 1.0
            ended = [1 - chances[accepted]] if accepted < drafted else []
            self._scores[i] += sum(math.log(max(chance, 1e-3)) for chance in (*chances[:accepted], *ended))
            for counts in (self._accepted[i], self._rejected[i]):
                counts[:] = [count * self._keep[i] for count in counts]
            for position in range(accepted):
                self._accepted[i][position] += 1
            if accepted < drafted:
                self._rejected[i][accepted] += 1
        self._estimate()

    def as_dict(self) -> dict[str, list]:
        """Return what was observed, by half-life: `accepted` and `rejected` by position of the draft, and `scores`."""
        accepted, rejected = ([list(counts) for counts in table] for table in (self._accepted, self._rejected))
        return {"accepted": accepted, "rejected": rejected, "scores": list(self._scores)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what was observed before.

        Args:
            saved: what `as_dict` returned.

        Raises:
            ValueError: a number is out of its range, or there are more or fewer than here. KeyError or TypeError are
                raised for a document of another form.
        """
        accepted, rejected = (
            [[_number(count, 0) for count in counts] for counts in saved[name]] for name in ("accepted", "rejected")
        )
        scores = [-_number(-score, 0) for score in saved["scores"]]
        sizes = [len(counts) for counts in (*accepted, *rejected)]
        if sizes != [len(counts) for counts in (*self._accepted, *self._rejected)] or len(scores) != len(self._scores):
            raise ValueError("acceptance has other sizes")
        self._accepted, self._rejected, self._scores = accepted, rejected, scores
        self._estimate()

    def _estimate(self) -> None:
        """Compute the chance of each draft by each half-life, and their mixture, `reached`."""
        self._chances = []
        self.reached = [0.0] * (1 + len(self._accepted[0]))
        best = max(self._scores)
        weights = [math.exp(score - best) for score in self._scores]
        for weight, accepted, rejected in zip(weights, self._accepted, self._rejected, strict=True):
            chances, chance, through = [], PRIOR_ACCEPTANCE, weight / sum(weights)
            self.reached[0] += through
            for position, (good, bad) in enumerate(zip(accepted, rejected, strict=True), start=1):
                # A draft is expected to do as well as the one before it until observations say otherwise.
                chance = (good + PRIOR_OBSERVATIONS * chance) / (good + bad + PRIOR_OBSERVATIONS)
                through *= chance
                chances.append(chance)
                self.reached[position] += through
            self._chances.append(chances)


class DraftLength:
    """Plans rounds and learns from them; one instance serves all texts of a bundle on a device.

    The loss is the time that drafting took beyond plain decoding so far, in plain passes, minus what it may lose. A
    round that could bring it above 0 is not planned, whatever its expected gain. So, by the costs as they are known,
    texts take at most 1.01 times as long as plain decoding and `INITIAL_LOSS_PASSES` passes together, and no stretch of
    them more than `MAX_SAVED_PASSES` passes beyond that.

    Attributes:
        costs: measured times of passes and draft steps.
    """

    def __init__(self, max_drafts: int, costs: Costs) -> None:
        """Begin without observations.

        Args:
            max_drafts: the largest K of a round.
            costs: times of passes and draft steps, which the caller's rounds are recorded in.
        """
        self._max_drafts, self.costs = max_drafts, costs
        self._sources: dict[str, AcceptanceEstimate] = {}
        self._loss_passes = -INITIAL_LOSS_PASSES

    def plan(self, available: Mapping[str, int]) -> Plan:
        """Choose a source and K for the next round.

        Args:
            available: by source, the largest number of drafts that it can give now.
        """
        unmeasured = self.costs.next_to_measure(available.get(DRAFTER, 0))
        if unmeasured is not None and self._affordable(DRAFTER, unmeasured):
            return Plan(DRAFTER, unmeasured)
        best, plan = 1.0, Plan(DRAFTER, 0)
        for source, max_drafts in available.items():
            tokens = 1.0
            reached = self._acceptance(source).reached
            for drafts in range(1, min(max_drafts, self._max_drafts) + 1):
                tokens += reached[drafts]
                rate = tokens / self.costs.relative(source, drafts)
                if rate > best and self._affordable(source, drafts):
                    best, plan = rate, Plan(source, drafts)
        return plan

    def learn(self, source: str, drafted: int, accepted: int) -> None:
        """Add a source's drafts of one round to its acceptance estimate.

        Args:
            source: where the drafts came from.
            drafted: drafts that were verified, or known to be right or wrong in another way; with 0 the source's
                earlier observations fade.
            accepted: how many of them were right.
        """
        self._acceptance(source).update(drafted, accepted)

    def record_loss(self, plan: Plan, tokens: int, verified: int) -> None:
        """Add a round's time, less the time of as many tokens by plain decoding, to the loss.

        Args:
            plan: the round's plan.
            tokens: how many tokens the round added.
            verified: how many of the plan's drafts were verified: fewer where rules forbid some.
        """
        cost = self.costs.relative(plan.source, plan.num_draft_tokens)
        if verified < plan.num_draft_tokens:
            cost += self.costs.relative("", verified) - self.costs.relative("", plan.num_draft_tokens)
        self._loss_passes += cost - tokens * (1 + LOSS_PASSES_PER_TOKEN)
        self._loss_passes = min(max(self._loss_passes, -MAX_SAVED_PASSES), MAX_SAVED)

    @property
    def is_new(self) -> bool:
        """Whether it has learned nothing yet."""
        return not self._sources and self._loss_passes == -INITIAL_LOSS_PASSES

    def as_dict(self) -> dict[str, Any]:
        """Return what it has learned, apart from the costs, which are a device's."""
        sources = {source: estimate.as_dict() for source, estimate in sorted(self._sources.items())}
        return {"loss_passes": self._loss_passes, "sources": sources}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what was learned before, in place of what this has learned.

        Args:
            saved: what `as_dict` returned.

        Raises:
            ValueError: a number is out of its range, or sizes are those of another K. KeyError, TypeError or
                AttributeError are raised for a document of another form.
        """
        loss, sources = _number(saved["loss_passes"], -MAX_SAVED_PASSES), {}
        for source, estimate in saved["sources"].items():
            sources[source] = AcceptanceEstimate(self._max_drafts)
            sources[source].restore(estimate)
        self._loss_passes, self._sources = loss, sources

    def _affordable(self, source: str, drafts: int) -> bool:
        """Whether the loss stays within the allowance even if no draft is accepted."""
        return self._loss_passes + self.costs.relative(source, drafts) - 1 <= 0

    def _acceptance(self, source: str) -> AcceptanceEstimate:
        if source not in self._sources:
            self._sources[source] = AcceptanceEstimate(self._max_drafts)
        return self._sources[source]


def _number(value: Any, smallest: float) -> float:
    """A saved number in its range; Python's `float` would take texts as well."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.20} is not a number")
    if not smallest <= value <= MAX_SAVED:
        raise ValueError(f"{value!r:.20} is out of range")
    return float(value)
