"""How many tokens to draft next, and where from: as many as make the most tokens a second, none included.

What a round of K drafts adds is 1 + the sum over i <= K of the chance that i drafts are accepted. What it costs is
measured. Both are estimated while a text is written, so nobody has to know the right K for a text or a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runtime_ref.costs import DRAFTER, Costs

# Rounds after which an observation counts half. Estimates of each are mixed by how well they foretold the last rounds:
# the slow one is exact on steady text, the fast one sees it change.
HALF_LIVES = (8, 64)
MEMORY = 0.95  # what is kept, each round, of how well they foretold

# What is assumed of a draft that was not tried lately, as so many observations. It is high, so that what is forgotten
# is tried again: no other probe is needed.
PRIOR, PRIOR_WEIGHT = 0.9, 2.0

# What drafting may lose against plain decoding: this share of the tokens, so many passes at the start, and of what it
# gained before at most so many.
ALLOWANCE, START, GAINED = 0.01, 2.0, 16.0


@dataclass(frozen=True)
class Plan:
    """What to draft next: the source, and how many tokens."""

    source: str
    num_draft_tokens: int


class Acceptance:
    """How likely it is, from one source, that each draft of a round is accepted if those before it were."""

    def __init__(self, most: int) -> None:
        self._keep = [0.5 ** (1 / rounds) for rounds in HALF_LIVES]
        self._accepted = [[0.0] * most for _ in HALF_LIVES]
        self._rejected = [[0.0] * most for _ in HALF_LIVES]
        self._foretold = [0.0] * len(HALF_LIVES)
        self._estimate()

    def update(self, drafted: int, accepted: int) -> None:
        """Count a round of which so many drafts were judged; a round without any makes what is known older."""
        for i, chances in enumerate(self._chances):
            self._foretold[i] *= MEMORY if drafted else 1.0
            ended = [1 - chances[accepted]] if accepted < drafted else []
            self._foretold[i] += sum(math.log(max(chance, 1e-3)) for chance in (*chances[:accepted], *ended))
            for counts in (self._accepted[i], self._rejected[i]):
                counts[:] = [count * self._keep[i] for count in counts]
            for position in range(accepted):
                self._accepted[i][position] += 1
            if accepted < drafted:
                self._rejected[i][accepted] += 1
        self._estimate()

    def _estimate(self) -> None:
        """The chance of each draft by each half-life, and `reached`: that so many drafts are accepted, from none on."""
        self._chances = []
        self.reached = [0.0] * (1 + len(self._accepted[0]))
        best = max(self._foretold)
        weights = [math.exp(foretold - best) for foretold in self._foretold]
        for weight, accepted, rejected in zip(weights, self._accepted, self._rejected, strict=True):
            chances, chance, through = [], PRIOR, weight / sum(weights)
            self.reached[0] += through
            for position, (good, bad) in enumerate(zip(accepted, rejected, strict=True), start=1):
                # A draft is expected to do as well as the one before it until it shows otherwise.
                chance = (good + PRIOR_WEIGHT * chance) / (good + bad + PRIOR_WEIGHT)
                through *= chance
                chances.append(chance)
                self.reached[position] += through
            self._chances.append(chances)


class DraftLength:
    """Plans rounds and learns from them; one for all texts of a bundle on a device.

    A round that could lose more than `ALLOWANCE` and the rest allow is not planned, whatever it promises. So, by the
    costs as they are known, texts take at most 1.01 times as long as plain decoding and `START` passes together, and no
    stretch of them more than `GAINED` passes beyond that.
    """

    def __init__(self, most: int, costs: Costs) -> None:
        """`most` drafts a round."""
        self._most, self.costs = most, costs
        self._sources: dict[str, Acceptance] = {}
        self._debt = -START

    def plan(self, room: Mapping[str, int]) -> Plan:
        """Choose a source and a number of drafts.

        Args:
            room: the most drafts that each source has to give now.
        """
        unknown = self.costs.unknown(room.get(DRAFTER, 0))
        if unknown is not None and self._affordable(DRAFTER, unknown):
            return Plan(DRAFTER, unknown)
        best, plan = 1.0, Plan(DRAFTER, 0)
        for source, most in room.items():
            tokens = 1.0
            reached = self._acceptance(source).reached
            for drafts in range(1, min(most, self._most) + 1):
                tokens += reached[drafts]
                rate = tokens / self.costs.relative(source, drafts)
                if rate > best and self._affordable(source, drafts):
                    best, plan = rate, Plan(source, drafts)
        return plan

    def learn(self, source: str, drafted: int, accepted: int) -> None:
        """Count drafts of a source, verified or seen to be right or wrong otherwise; none: its knowledge grows old."""
        self._acceptance(source).update(drafted, accepted)

    def pay(self, plan: Plan, tokens: int) -> None:
        """Count what a round of this plan cost and added."""
        self._debt += self.costs.relative(plan.source, plan.num_draft_tokens) - tokens * (1 + ALLOWANCE)
        self._debt = max(self._debt, -GAINED)

    def _affordable(self, source: str, drafts: int) -> bool:
        """Whether the round may be lost as a whole."""
        return self._debt + self.costs.relative(source, drafts) - 1 <= 0

    def _acceptance(self, source: str) -> Acceptance:
        if source not in self._sources:
            self._sources[source] = Acceptance(self._most)
        return self._sources[source]
