"""Choose the width of each class of matrices for a number of bytes, by what each was measured to cost."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from exporter.calibration.bit_costs import CLASSES, Cost
from exporter.quantization.recipes import RECIPES, Recipe, Rule
from runtime_ref.errors import InputError


@dataclass(frozen=True)
class Choice:
    """A width for each class of matrices.

    Attributes:
        costs: a cost of each class.
        bytes: of the bundle, rounded up.
    """

    costs: tuple[Cost, ...]
    bytes: int

    @property
    def kl(self) -> float:
        """Sum of the divergences of the classes, in nats, as if each made its error alone."""
        return sum(cost.kl for cost in self.costs)

    def recipe(self, name: str) -> Recipe:
        """Return a recipe with a rule for each class; the drafter is stored as in `int4`."""
        drafter = (rule for rule in RECIPES["int4"].rules if rule.match.startswith("drafter."))
        return Recipe(name, (*(Rule(CLASSES[cost.matrices], cost.width) for cost in self.costs), *drafter))


def too_few(target_bytes: int, smallest: int) -> InputError:
    """Return the error of a number of bytes that no choice fits into."""
    return InputError(
        f"--target-bytes is {target_bytes}, but the smallest choice, with the drafter as in int4, needs about"
        f" {smallest}; pass more"
    )


@dataclass(frozen=True)
class Bits:
    """What bits cost a target.

    Attributes:
        costs: of each class of matrices in each width.
        other_bytes: of a bundle without these matrices.
        positions: how many positions were compared.
        held_out: the texts of these positions, for people.
        texts: the texts that matrices of 4 bits were calibrated on; None where all were rounded to the nearest.
    """

    costs: tuple[Cost, ...]
    other_bytes: int
    positions: int
    held_out: str
    texts: str | None

    @property
    def classes(self) -> list[str]:
        """The classes of matrices that the target has, in the order of `CLASSES`."""
        return list(dict.fromkeys(cost.matrices for cost in self.costs))

    def choices(self) -> list[Choice]:
        """Return the best choices by their bytes, the fewest first: none is both smaller and nearer than another."""
        by_class = [[cost for cost in self.costs if cost.matrices == title] for title in self.classes]
        every = [Choice(c, self.other_bytes + sum(cost.bytes for cost in c)) for c in itertools.product(*by_class)]
        best: list[Choice] = []
        for choice in sorted(every, key=lambda choice: (choice.bytes, choice.kl)):
            if not best or choice.kl < best[-1].kl:
                best.append(choice)
        return best

    def choose(self, target_bytes: int) -> Choice:
        """Return the choice with the least divergence whose bundle has at most so many bytes.

        Raises:
            InputError: none is as small.
        """
        best = self.choices()
        fitting = [choice for choice in best if choice.bytes <= target_bytes]
        if not fitting:
            raise too_few(target_bytes, best[0].bytes)
        return fitting[-1]

    def named(self) -> dict[str, Choice]:
        """Return the choices that equal named recipes in all but the drafter, by name."""
        found = {}
        for name, recipe in RECIPES.items():
            widths = {title: recipe.width(CLASSES[title].replace("*", "0")) for title in self.classes}
            costs = tuple(cost for cost in self.costs if cost.width == widths[cost.matrices])
            if len(costs) == len(widths):
                found[name] = Choice(costs, self.other_bytes + sum(cost.bytes for cost in costs))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the measurements as `recipe --json` prints them."""
        return {
            "costs": [{**asdict(cost), "width": asdict(cost.width)} for cost in self.costs],
            "other_bytes": self.other_bytes,
            "positions": self.positions,
            "held_out": self.held_out,
            "calibrated_on": self.texts,
            "choices": [{"bytes": choice.bytes, "kl": choice.kl} for choice in self.choices()],
        }
