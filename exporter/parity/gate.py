"""Limits on quality and size that a build pipeline sets, and the checks that hold a bundle to them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from exporter.parity.checks import Check

# Figures of a bundle by name; None where it was not measured.
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Gate:
    """What a bundle must fulfil besides parity; None is no limit.

    Attributes:
        min_choices: least share of positions, 0 to 1, at which bundle and checkpoint choose the same token.
        min_acceptance: least share of draft tokens, 0 to 1, that are accepted.
        max_kl: largest mean KL divergence of the bundle's tokens from the checkpoint's, in nats.
        max_bundle_bytes: largest size of all files together.
    """

    min_choices: float | None = None
    min_acceptance: float | None = None
    max_kl: float | None = None
    max_bundle_bytes: int | None = None

    @property
    def needs_checkpoints(self) -> bool:
        """Whether the bundle must be compared with its checkpoints."""
        return self.min_choices is not None or self.max_kl is not None


def gate_checks(gate: Gate, figures: Figures, measured_on: str, compared_on: str) -> Iterator[Check]:
    """Yield a check for each limit that is set.

    Args:
        gate: the limits.
        figures: the bundle's, as `exporter.parity.stages.measure_parity` returns them.
        measured_on: the texts that drafts were counted on, for people.
        compared_on: the texts that bundle and checkpoints were compared on.
    """
    rows = (
        ("choices", "choices_kept", gate.min_choices, 1, "{:.4g} of choices kept", "at least {:g}"),
        ("acceptance", "acceptance_rate", gate.min_acceptance, 1, "{:.4g} of drafts accepted", "at least {:g}"),
        ("KL", "kl", gate.max_kl, -1, "{:.4g} nats", "at most {:g}"),
        ("size", "bundle_bytes", gate.max_bundle_bytes, -1, "{:.0f} bytes", "at most {:.0f}"),
    )
    for output, name, limit, sign, shown, asked in rows:
        if limit is None:
            continue
        value = figures.get(name)
        texts = {"bundle_bytes": "", "acceptance_rate": f", on {measured_on}"}.get(name, f", on {compared_on}")
        if value is None or math.isnan(value):
            yield Check("gate", output, False, detail=f"not measured ({asked.format(limit)} asked for)")
        else:
            detail = f"{shown.format(value)}, {asked.format(limit)} asked for{texts}"
            yield Check("gate", output, sign * value >= sign * limit, detail=detail)
