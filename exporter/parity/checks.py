"""One row of the parity table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One row of the parity table.

    Attributes:
        stage: the stage that the check belongs to.
        output: what is compared.
        passed: whether it is equal, or within the tolerance.
        error: largest error relative to the output's largest magnitude, or to 1 if that is smaller; None if the check
            is exact.
        tolerance: largest error allowed, in the same unit; None if the check is exact.
        detail: what was compared or what differs, for people.
    """

    stage: str
    output: str
    passed: bool
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""

    @property
    def result(self) -> str:
        """The error and what is allowed, or the detail."""
        return self.detail if self.error is None else f"{self.error:.1e} (allowed {self.tolerance:.0e})"

    def as_dict(self) -> dict[str, Any]:
        """Return the check for `--json`, whose keys do not change: the stage has its former name there, `rung`."""
        return {"rung": self.stage, **{name: value for name, value in vars(self).items() if name != "stage"}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Check":
        """Return the check whose `as_dict` is `values`."""
        return cls(values["rung"], **{name: value for name, value in values.items() if name != "rung"})
