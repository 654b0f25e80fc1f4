"""Measurements on texts that a bundle writes: its values, and the values and acceptance of eager torch's variants."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.doctor.evidence import Probe, Reading, Written, probes, read, row_distance, row_errors, write
from exporter.doctor.faults import Change, Fault, changed_step, with_softcap
from exporter.doctor.verdicts import FLOOR, allowed, gain, stored_as
from exporter.graphs.backend import load_backend
from exporter.graphs.spec import PREFILL_CHUNK
from exporter.modeling.drafter import KV, Drafter
from exporter.parity.drafting import DRAFT_STEPS, draft_rounds
from exporter.parity.quality import bundle_logits
from exporter.parity.reference import Reference
from exporter.quantization.recipes import RECIPES
from runtime_ref.graph_engine import GraphEngine

# Variants besides the faults: the right one, and one with something else in the place of a part.
AS_IT_SHOULD, SOFTCAP, DENSE = "as it should be", "softcap", "a dense head"
FP32_TARGET, FP32_DRAFTER, FP32_BOTH = "the target in fp32", "the drafter in fp32", "both in fp32"
UNROUNDED, FOUND = "activations as they are", "the bundle's"

# Kinds of values: logits at the bundle's top ids, its best ids, the states that rounds start from, and of draft steps
# the next states and the drafts.
LOGITS, CHOICES, STATES, STEPS, DRAFTS = "logits", "choices", "states", "steps", "drafts"

# What may be wrong with the cache.
SHIFTED, STALE, NUMBERS = "shifted", "stale", "numbers"
CLOSE = 0.1  # rows of another token are about 1 off, rounding to 8 bits makes 0.01


class Study:
    """Adds up what texts show; a text is let go before the next one.

    Attributes:
        rounds: accepted drafts [T] of each text's rounds, teacher-forced at every position, by variant.
        drafted, accepted: in the bundle's own rounds.
        recall: how many drafts a dense head would have chosen as well, and of how many.
        problems: what is wrong with the cache, by kind.
        cache_error: of the worst row of the KV cache, relative to the row, and what was allowed there.
    """

    def __init__(self, engine: GraphEngine, pair: Pair, faults: Sequence[Fault]) -> None:
        manifest, recipe = engine.manifest, RECIPES[engine.manifest.recipe]
        self.engine, self.pair, self.faults, self.in_fp32 = engine, pair, faults, manifest.recipe == "fp32"
        reference = Reference(pair, recipe, load_backend(manifest.backend).scales())
        right = reference.drafter(rounded=True)
        self._targets, self._drafters = {AS_IT_SHOULD: reference.target(rounded=True)}, {AS_IT_SHOULD: right}
        self.softcap = pair.drafter.text.final_logit_softcapping or pair.target.final_logit_softcapping
        if self.softcap is not None:
            self._drafters[SOFTCAP] = with_softcap(right, self.softcap)
        if pair.two_stage is not None:
            self._drafters[DENSE] = Reference(pair.dense, RECIPES["fp32"]).drafter()
        if not self.in_fp32:
            full = Reference(pair, RECIPES["fp32"])
            self._targets |= {UNROUNDED: reference.target(), FP32_TARGET: full.target()}
            self._drafters |= {UNROUNDED: reference.drafter(), FP32_DRAFTER: full.drafter()}
        self.rounds: dict[str, list[Tensor]] = defaultdict(list)
        self.drafted = self.accepted = 0
        self.recall = [0, 0]
        self.cache_error = (0.0, FLOOR)
        self._values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self.problems: dict[str, str] = {}

    @property
    def texts(self) -> int:
        """How many texts were long enough for a round."""
        return len(self.rounds[AS_IT_SHOULD])

    def add(self, prompt: Sequence[int], max_new_tokens: int, is_text: bool) -> None:
        """Let the bundle continue a prompt greedily, and measure on what it wrote; acceptance only if it is text."""
        written = write(self.engine, prompt, max_new_tokens)
        readings = {name: read(target, written.text, written.start) for name, target in self._targets.items()}
        right = readings[AS_IT_SHOULD]
        unrounded, full = readings.get(UNROUNDED, right), readings.get(FP32_TARGET, right)
        logits, ids = (part[written.start - 1 :] for part in bundle_logits(self.engine, written.text))
        self._keep(LOGITS, FOUND, logits)
        for name, reading in ((AS_IT_SHOULD, right), (UNROUNDED, unrounded), (FP32_TARGET, full)):
            self._keep(LOGITS, name, reading.logits.gather(1, ids))
        self._keep(CHOICES, FOUND, ids[:, 0])
        self._keep(CHOICES, FP32_TARGET, full.logits.argmax(1))
        for position, state in written.fed:
            row = position - written.start
            self._keep(STATES, FOUND, state.unsqueeze(0))
            self._keep(STATES, AS_IT_SHOULD, right.states[[row]])
            self._keep(STATES, UNROUNDED, unrounded.states[[row]])
            for fault in self.faults:
                if fault.change.before_norm:
                    self._keep(STATES, fault.label, right.before_norm[[row]])
        self._check_cache(written, right, unrounded)
        for probe in probes(self.engine, self.pair, written):
            self._add_probe(probe)
        if is_text:
            self.drafted, self.accepted = self.drafted + written.drafted, self.accepted + written.accepted
        if is_text and len(written.text) > written.start + DRAFT_STEPS:
            self._add_rounds(written, right, full)

    def values(self, kind: str) -> dict[str, Tensor]:
        """Values of one kind, by variant, the bundle's among them: [rows, E], or [rows] of ids."""
        return {name: torch.cat(parts) for (of, name), parts in self._values.items() if of == kind}

    def share(self, variant: str) -> float:
        """Drafts accepted of those proposed."""
        rounds = torch.cat(self.rounds[variant])
        return float(rounds.sum()) / (len(rounds) * DRAFT_STEPS)

    @property
    def clustered(self) -> str:
        """The variant that differs from `DENSE` in the head alone: rounding is another experiment's."""
        return AS_IT_SHOULD if self.in_fp32 else FP32_DRAFTER

    def gain(self, variant: str, beside: str = AS_IT_SHOULD) -> tuple[float, float]:
        """How much more is accepted so, and the standard error of that."""
        return gain(self.rounds[beside], self.rounds[variant], DRAFT_STEPS)

    def _keep(self, kind: str, name: str, rows: Tensor) -> None:
        self._values[kind, name].append(rows)

    def _check_cache(self, written: Written, right: Reading, unrounded: Reading) -> None:
        """Every snapshot's rows; the first that are wrong say what happened, later ones follow from them."""
        eager = max(float(row_distance(a, b).max()) for a, b in zip(unrounded.kv, right.kv, strict=True))
        limit, kv = allowed(eager), dict(zip(written.snapshots[0].rows, right.kv, strict=True))
        for snapshot in written.snapshots:
            if snapshot.position != snapshot.tokens:
                tokens = f"{snapshot.tokens} tokens are in the text, the runtime is at position {snapshot.position}"
                self.problems.setdefault(STALE, f"after a round {tokens}")
                return
            touched, errors = row_errors(snapshot, snapshot.written), row_errors(snapshot, kv)
            self.cache_error = max(self.cache_error, (float(errors.max()), limit), key=lambda pair: pair[0] / pair[1])
            # Rows that are another position's are so in the graph or in the runtime, all else only in the runtime: of
            # rows as the target writes them the experiment on its precision judges.
            shifted = {by: float(row_errors(snapshot, kv, by).median()) for by in (1, -1)}
            by, closest = min(shifted.items(), key=lambda item: item[1])
            if len(errors) > 2 and float(errors.median()) > max(limit, 3 * closest):
                way = "down" if by > 0 else "up"
                self.problems[SHIFTED] = f"the cache's rows lie 1 too far {way}: {closest:.1e} off eager torch so"
                return
            if not touched.any():
                continue
            wrong = touched[touched > 0]
            off = f"off what the target wrote by {float(wrong.median()):.1e}"
            if float(wrong.median()) > CLOSE:
                which = f"{len(wrong)} of the cache's newest {len(errors)} rows"
                self.problems.setdefault(STALE, f"{which} are not what the accepted tokens wrote: {off}")
            else:
                narrow = stored_as([rows for _, rows in snapshot.rows.values()])
                what = f"every number is a {narrow}" if narrow else "numbers are close"
                self.problems.setdefault(NUMBERS, f"{what}, {off}")
            return

    def _add_probe(self, probe: Probe) -> None:
        self._keep(STEPS, FOUND, probe.next_states)
        self._keep(DRAFTS, FOUND, probe.drafts)
        count = len(probe.tokens)
        inputs = probe.tokens, probe.states, torch.full((count,), probe.position), torch.arange(count)
        start, right = torch.tensor([probe.window_start]), self._drafters[AS_IT_SHOULD]

        def keep(name: str, drafter: Drafter, change: Change = Change()) -> None:
            hidden, states = changed_step(change)(drafter, *inputs, start, probe.kv)
            self._keep(STEPS, name, states)
            self._keep(DRAFTS, name, drafter.head(hidden))

        for name in (AS_IT_SHOULD, UNROUNDED, SOFTCAP):
            if name in self._drafters:
                keep(name, self._drafters[name])
        for fault in self.faults:
            if not fault.change.before_norm:
                keep(fault.label, right, fault.change)

    def _add_rounds(self, written: Written, right: Reading, full: Reading) -> None:
        """Rounds at every position of the written text whose drafts it has tokens for."""
        text, start = torch.tensor(written.text), written.start
        positions = torch.arange(start, len(text) - DRAFT_STEPS)
        tokens, following = text[positions], positions.unsqueeze(1) + torch.arange(1, DRAFT_STEPS + 1)
        drafters, shared = self._drafters, right.shared(self.pair)

        def run(
            drafter: Drafter, states: Tensor, kv: KV, wanted: Tensor, change: Change = Change()
        ) -> tuple[Tensor, Tensor, Tensor]:
            parts, step = [], changed_step(change)
            for rows in torch.arange(len(tokens)).split(PREFILL_CHUNK):
                parts.append(draft_rounds(drafter, tokens[rows], states[rows], positions[rows], kv, step))
            hidden, drafts = (torch.cat(part) for part in zip(*parts, strict=True))
            return (drafts == wanted).cumprod(1).sum(1), hidden.flatten(0, 1), drafts.flatten()

        wanted = text[following]
        for name in (AS_IT_SHOULD, SOFTCAP, DENSE, FP32_DRAFTER):
            if name in drafters:
                accepted, hidden, drafts = run(drafters[name], right.states, shared, wanted)
                self.rounds[name].append(accepted)
                if name == self.clustered and DENSE in drafters:
                    dense = torch.cat([drafters[DENSE].head(rows) for rows in hidden.split(PREFILL_CHUNK)])
                    self.recall = [self.recall[0] + int((dense == drafts).sum()), self.recall[1] + len(drafts)]
        for fault in self.faults:
            if not fault.change.sees_ahead:
                states = right.before_norm if fault.change.before_norm else right.states
                self.rounds[fault.label].append(run(drafters[AS_IT_SHOULD], states, shared, wanted, fault.change)[0])
        if not self.in_fp32:
            # Where this target would have gone on otherwise its later choices follow a text that is not its own: that
            # makes its acceptance a little lower than it is, never higher.
            chosen = full.logits.argmax(1)[following - start]
            for name, drafter in ((FP32_TARGET, AS_IT_SHOULD), (FP32_BOTH, FP32_DRAFTER)):
                self.rounds[name].append(run(drafters[drafter], full.states, full.shared(self.pair), chosen)[0])
