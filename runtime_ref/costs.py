"""What a device takes for passes and draft steps: measured while it decodes, and kept beside the bundle."""

import hashlib
import json
import os
import platform
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json
from runtime_ref.manifest import MANIFEST, Manifest, round_up

DRAFTER = "drafter"  # the source of drafts whose steps take time

RECENT = 5  # measurements that count; the least of them, because whatever else runs only ever adds
ENOUGH = 2  # of each size, before sizes are chosen by their costs: the first may just have warmed up

# What a further token of a pass, and a draft step, are taken to cost beside a plain pass until they are measured.
UNKNOWN_TOKEN, UNKNOWN_STEP = 0.2, 0.1


class Costs:
    """Seconds of passes by their number of tokens, and of a draft step, each as they were lately."""

    def __init__(self, most: int, row_multiple: int = 1) -> None:
        """`most` drafts a round; passes are filled up to `row_multiple` tokens."""
        self._row_multiple = row_multiple
        # None, and then the sizes that show the curve: those between are on the line.
        self._sizes = sorted({0, most, *(2**i for i in range(most.bit_length()) if 2**i < most)})
        self._passes: dict[int, deque[float]] = {}
        self._step: deque[float] = deque(maxlen=RECENT)
        self._known: dict[int, float] = {}
        self._known_step: float | None = None
        self._relative: dict[tuple[bool, int], float] = {}

    def measured(self, drafts: int, verify_seconds: float, draft_seconds: float | None = None) -> None:
        """Count a round: its pass, and its draft steps if the drafter made the drafts."""
        self._passes.setdefault(self._filled(drafts), deque(maxlen=RECENT)).append(verify_seconds)
        if draft_seconds is not None and drafts:
            self._step.append(draft_seconds / drafts)
        self._refresh()

    def unknown(self, room: int) -> int | None:
        """The least number of drafts, at most `room`, whose round is to be measured; None if all are known enough."""
        known = {size: len(times) for size, times in self._passes.items()}
        sizes = (size for size in self._sizes if size <= room)
        return next((size for size in sizes if known.get(self._filled(size), 0) < ENOUGH), None)

    def relative(self, source: str, drafts: int) -> float:
        """Cost of a round of so many drafts beside a plain one."""
        key = source == DRAFTER, drafts
        if key not in self._relative:
            plain = self.verify_seconds(0)
            steps = drafts * (self.step_seconds or UNKNOWN_STEP * plain) if source == DRAFTER else 0.0
            self._relative[key] = (self.verify_seconds(drafts) + steps) / plain
        return self._relative[key]

    @property
    def step_seconds(self) -> float | None:
        """Of one draft step; None before it was measured."""
        return min(self._step, default=None)

    def verify_seconds(self, drafts: int) -> float:
        """Of a pass over `last` and so many drafts; on the line between those measured, and beyond them as steep."""
        size, sizes = self._filled(drafts), list(self._known)
        if not sizes:
            return 1 + UNKNOWN_TOKEN * drafts
        if sizes[0] <= size <= sizes[-1]:
            return float(np.interp(size, sizes, list(self._known.values())))
        first, last = sizes[0], sizes[-1]
        rise = self._known[last] - self._known[first]
        slope = rise / (last - first) if last > first else UNKNOWN_TOKEN * self._known[first]
        return max(self._known[last] + slope * (size - last), UNKNOWN_TOKEN * self._known[first])

    def _refresh(self) -> None:
        """Bring what is derived up to date; mostly nothing changed, because the least of the recent ones counts."""
        known, least = {}, float("inf")
        for size in sorted(self._passes, reverse=True):
            # A longer pass is never cheaper: what was slow by accident is corrected by a longer one that was not.
            least = known[size] = min(least, *self._passes[size])
        known = dict(sorted(known.items()))
        if (known, self.step_seconds) != (self._known, self._known_step):
            self._known, self._known_step = known, self.step_seconds
            self._relative.clear()

    def as_dict(self) -> dict[str, Any]:
        """Seconds, as they are kept in a file: of passes by their number of tokens, and of a draft step."""
        passes = {str(size): min(times) for size, times in sorted(self._passes.items())}
        return {"verify_seconds": passes, "draft_step_seconds": self.step_seconds}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over what `as_dict` gave; raises ValueError, KeyError or TypeError for anything else."""
        step = facts["draft_step_seconds"]
        passes = {int(size): float(seconds) for size, seconds in facts["verify_seconds"].items()}
        steps = [] if step is None else [float(step)]
        if not all(0 < seconds < 1e6 for seconds in (*passes.values(), *steps)) or min(passes, default=1) < 1:
            raise ValueError("costs must be positive")
        self._passes = {size: deque([seconds] * ENOUGH, maxlen=RECENT) for size, seconds in passes.items()}
        self._step.extend(steps)
        self._refresh()

    def _filled(self, drafts: int) -> int:
        return round_up(drafts + 1, self._row_multiple)


def costs_file(bundle: Path) -> Path:
    """Where the costs of a bundle are kept: beside it, because it is the same on all devices and they are not."""
    bundle = bundle.resolve()
    return bundle.parent / f"{bundle.name}.costs.json"


def load_costs(bundle: Path, manifest: Manifest, threads: int | None) -> Costs:
    """What was measured on this device with this bundle and as many threads, else nothing.

    Raises:
        InputError: the file is not what `save_costs` writes.
    """
    costs, file = Costs(manifest.max_draft_tokens, manifest.row_multiple), costs_file(bundle)
    if file.exists():
        kept = read_json(file, "costs that were measured; delete the file, and they are measured again")
        try:
            if kept["of"] == _identity(bundle, threads):
                costs.restore(kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{file}: not the costs of a bundle ({type(error).__name__}: {error}); delete it, and they are measured"
                " again"
            ) from error
    return costs


def save_costs(costs: Costs, bundle: Path, threads: int | None) -> None:
    """Keep costs for `load_costs`; raises OSError where nothing can be written."""
    file = costs_file(bundle)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps({"of": _identity(bundle, threads), **costs.as_dict()}) + "\n", encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _identity(bundle: Path, threads: int | None) -> dict[str, Any]:
    """What costs depend on: device, threads, and the bundle with all its digests."""
    device = [platform.node(), platform.machine(), platform.processor(), os.cpu_count()]
    return {
        "device": device,
        "threads": threads,
        "bundle": hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest(),
    }
