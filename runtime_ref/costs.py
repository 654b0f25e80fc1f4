"""Times of passes and draft steps on a device: measured while it decodes, and kept in the device's folder."""

import functools
import hashlib
import json
import os
import platform
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from runtime_ref.device_folder import device_folder, write_whole
from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json
from runtime_ref.locks import locked
from runtime_ref.manifest import MANIFEST, round_up

DRAFTER = "drafter"  # the source of drafts whose steps take time

# The newest measurements of each pass, of which the smallest counts: whatever else runs only ever adds time.
MAX_MEASUREMENTS = 5
# Measurements of each pass before K is chosen by its time: the first may include warming up.
MIN_MEASUREMENTS = 2

COSTS_VERSION = 2  # of the file

# Assumed times before anything is measured, in plain passes: of each further token of a pass, and of a draft step.
ASSUMED_TOKEN_PASSES, ASSUMED_STEP_PASSES = 0.2, 0.1


class Costs:
    """Recent times of passes by their number of tokens, and of a draft step."""

    def __init__(self, max_drafts: int, row_multiple: int = 1) -> None:
        """Begin without measurements.

        Args:
            max_drafts: the largest K of a round.
            row_multiple: passes are padded to a multiple of this many tokens, so those of equal length share a time.
        """
        self._row_multiple = row_multiple
        # Numbers of drafts that are measured: 0, powers of two and the maximum; those between are interpolated.
        self._sizes = sorted({0, max_drafts, *(2**i for i in range(max_drafts.bit_length()) if 2**i < max_drafts)})
        self._passes: dict[int, deque[float]] = {}
        self._step: deque[float] = deque(maxlen=MAX_MEASUREMENTS)
        self._known: dict[int, float] = {}
        self._known_step: float | None = None
        self._relative: dict[tuple[bool, int], float] = {}

    def record(self, drafts: int, verify_seconds: float, draft_seconds: float | None = None) -> None:
        """Add the times of a round.

        Args:
            drafts: K of the round.
            verify_seconds: time of its pass.
            draft_seconds: time of its K draft steps; None if the drafts did not come from the drafter.
        """
        times = self._passes.setdefault(self._pass_tokens(drafts), deque(maxlen=MAX_MEASUREMENTS))
        times.append(verify_seconds)
        if draft_seconds is not None and drafts:
            self._step.append(draft_seconds / drafts)
        self._refresh()

    def next_to_measure(self, max_drafts: int) -> int | None:
        """Return the smallest K that has too few measurements; None if all have enough.

        Args:
            max_drafts: the largest K to consider.
        """
        counts = {tokens: len(times) for tokens, times in self._passes.items()}
        sizes = (size for size in self._sizes if size <= max_drafts)
        return next((size for size in sizes if counts.get(self._pass_tokens(size), 0) < MIN_MEASUREMENTS), None)

    def relative(self, source: str, drafts: int) -> float:
        """Return the time of a round in plain passes.

        Args:
            source: where its drafts come from; only those of `DRAFTER` take time.
            drafts: K of the round.
        """
        key = source == DRAFTER, drafts
        if key not in self._relative:
            plain = self.verify_seconds(0)
            steps = drafts * (self.step_seconds or ASSUMED_STEP_PASSES * plain) if source == DRAFTER else 0.0
            self._relative[key] = (self.verify_seconds(drafts) + steps) / plain
        return self._relative[key]

    @property
    def step_seconds(self) -> float | None:
        """Time of one draft step; None before it was measured."""
        return min(self._step, default=None)

    def verify_seconds(self, drafts: int) -> float:
        """Return the time of the pass of a round.

        It is interpolated linearly between measured passes and extrapolated beyond them.

        Args:
            drafts: K of the round; the pass runs K+1 tokens.

        Returns:
            Seconds; plain passes before anything is measured.
        """
        tokens, sizes = self._pass_tokens(drafts), list(self._known)
        if not sizes:
            return 1 + ASSUMED_TOKEN_PASSES * drafts
        if sizes[0] <= tokens <= sizes[-1]:
            return float(np.interp(tokens, sizes, list(self._known.values())))
        first, last = sizes[0], sizes[-1]
        rise = self._known[last] - self._known[first]
        slope = rise / (last - first) if last > first else ASSUMED_TOKEN_PASSES * self._known[first]
        return max(self._known[last] + slope * (tokens - last), ASSUMED_TOKEN_PASSES * self._known[first])

    def _refresh(self) -> None:
        """Recompute the derived times; mostly nothing changed, because the smallest of the recent ones counts."""
        known, smallest = {}, float("inf")
        for tokens in sorted(self._passes, reverse=True):
            # A longer pass is never cheaper: a time that was slow by accident is corrected by a longer pass's.
            smallest = known[tokens] = min(smallest, *self._passes[tokens])
        known = dict(sorted(known.items()))
        if (known, self.step_seconds) != (self._known, self._known_step):
            self._known, self._known_step = known, self.step_seconds
            self._relative.clear()

    def as_dict(self) -> dict[str, Any]:
        """Return the costs as they are kept in a file: seconds of passes by number of tokens, and of a draft step."""
        passes = {str(tokens): min(times) for tokens, times in sorted(self._passes.items())}
        return {"verify_seconds": passes, "draft_step_seconds": self.step_seconds}

    def restore(self, saved: dict[str, Any]) -> None:
        """Replace the measurements by saved ones.

        Args:
            saved: what `as_dict` returned.

        Raises:
            ValueError: a time or a number of tokens is not positive. KeyError, TypeError or AttributeError are raised
                for a document of another form.
        """
        step = saved["draft_step_seconds"]
        passes = {int(tokens): float(seconds) for tokens, seconds in saved["verify_seconds"].items()}
        steps = [] if step is None else [float(step)]
        if not all(0 < seconds < 1e6 for seconds in (*passes.values(), *steps)) or min(passes, default=1) < 1:
            raise ValueError("costs must be positive")
        self._passes = {
            tokens: deque([seconds] * MIN_MEASUREMENTS, maxlen=MAX_MEASUREMENTS) for tokens, seconds in passes.items()
        }
        self._step.extend(steps)
        self._refresh()

    def _pass_tokens(self, drafts: int) -> int:
        """Tokens of the pass that verifies so many drafts, padding included."""
        return round_up(drafts + 1, self._row_multiple)


def costs_file(bundle: Path) -> Path:
    """Return the file of a bundle's costs, which may not exist."""
    return device_folder(bundle) / "costs.json"


def load_costs(bundle: Path, threads: int | None, max_drafts: int, row_multiple: int = 1) -> Costs:
    """Load the costs that were measured with this bundle on such a device, else return costs without measurements.

    The file is a cache: one that is damaged, or of another version, is as good as none.

    Args:
        bundle: directory of the bundle.
        threads: threads inside an operation; costs that were measured with another number do not count.
        max_drafts: as for `Costs`.
        row_multiple: as for `Costs`.
    """
    return _restored(_saved(bundle).get(_key(threads)), max_drafts, row_multiple)


def save_costs(costs: Costs, bundle: Path, threads: int | None) -> None:
    """Write costs to the file that `load_costs` reads; what other decoders saved there, and this one has not, stays.

    Args:
        costs: what was measured.
        bundle: directory of the bundle.
        threads: threads inside an operation, as for `load_costs`.

    Raises:
        OSError: the file cannot be written.
    """
    file = costs_file(bundle)
    file.parent.mkdir(exist_ok=True)
    with locked(file.with_name(f".{file.name}.lock")):
        saved, key = _saved(bundle), _key(threads)
        before, new = _restored(saved.get(key)).as_dict(), costs.as_dict()
        new["verify_seconds"] = before["verify_seconds"] | new["verify_seconds"]
        new["draft_step_seconds"] = new["draft_step_seconds"] or before["draft_step_seconds"]
        document = {"version": COSTS_VERSION, "bundle": _digest(bundle), "devices": {**saved, key: new}}
        write_whole(file, json.dumps(document))


def _restored(entry: Any, max_drafts: int = 0, row_multiple: int = 1) -> Costs:
    """The costs of an entry of the file; without measurements if there is none, or a malformed one."""
    costs = Costs(max_drafts, row_multiple)
    try:
        costs.restore(entry)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return Costs(max_drafts, row_multiple)
    return costs


def _saved(bundle: Path) -> dict[str, Any]:
    """Saved costs of this bundle by `_key`; none if the file is missing, damaged, or of another bundle or version."""
    try:
        document = read_json(costs_file(bundle), "measured costs")
        if document["version"] == COSTS_VERSION and document["bundle"] == _digest(bundle):
            return dict(document["devices"])
    except (InputError, KeyError, TypeError, ValueError):
        pass
    return {}


def _digest(bundle: Path) -> str:
    """Stands for the bundle: it is another one after another export."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def _key(threads: int | None) -> str:
    """What costs depend on besides the bundle: kind of processor and threads. Host names differ between containers."""
    return f"{platform.machine()}, {_processor()}, {os.cpu_count()} CPUs, {threads or 'all'} threads"


@functools.cache  # needed at the end of every text; with many processors the file is long
def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = re.findall(r"^model name\s*: (.+)$", text, re.M)[:1]
        # arm64 has numbers instead, and cores of several kinds.
        names += sorted(set(re.findall(r"^CPU (?:implementer|part)\s*: (\w+)$", text, re.M)))
    except (OSError, ValueError):
        names = []
    return " ".join(names) or platform.processor()
