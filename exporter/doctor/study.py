"""Collect measurements on texts that a bundle generates: its values, and what variants in eager torch compute there."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.doctor.evidence import (
    Continuation,
    EagerOutputs,
    Probe,
    continue_prompt,
    probes,
    row_distances,
    row_errors,
    run_eager,
)
from exporter.doctor.faults import Change, Fault, changed_step, with_softcap
from exporter.doctor.verdicts import MIN_TOLERANCE, acceptance_gain, error_tolerance, narrower_dtype
from exporter.graphs.spec import PREFILL_CHUNK_TOKENS
from exporter.modeling.drafter import KV, Drafter
from exporter.modeling.target import is_suppressed
from exporter.parity.drafting import DRAFT_STEPS, draft_rounds
from exporter.parity.quality import bundle_logits
from exporter.parity.reference import Reference
from exporter.quantization.recipes import RECIPES, Recipe, recipe_of
from runtime_ref.graph_engine import GraphEngine

# Variants in eager torch besides the faults: the correct one, and those with one part replaced.
CORRECT, SOFTCAP, DENSE = "correct", "softcap", "a dense head"
FP32_TARGET, FP32_DRAFTER, FP32_BOTH = "the target in fp32", "the drafter in fp32", "both in fp32"
UNROUNDED = "unrounded activations"
ACTUAL = "the bundle"  # its own values are stored beside those of the variants

# Quantities: logits at the bundle's top ids, the best ids, the states that rounds start from, and the next states and
# draft tokens of draft steps.
LOGITS, TOP_IDS, ROUND_STATES, NEXT_STATES, DRAFTS = "logits", "top ids", "round states", "next states", "drafts"

# Problems of the cache: rows of another position, rows of tokens that were rejected, and numbers that were rounded.
SHIFTED, STALE, ROUNDED = "shifted", "stale", "rounded"
MAX_ROUNDING_ERROR = 0.1  # relative to a row: rows of another token are about 1 off, rounding to 8 bits is 0.01


class Study:
    """Measurements on texts, added up; each text is released before the next one.

    Attributes:
        engine: runs the bundle.
        pair: the checkpoints that it was made from.
        faults: the faults that are tried.
        in_fp32: whether the bundle's recipe is fp32.
        softcap: `final_logit_softcapping` of the drafter's config, else of the target's; None if neither has one.
        answers: for each text, the tokens [..] int64 that the bundle chose.
        rounds: by variant, for each text, accepted drafts [rounds] int64 of rounds that start at every position of it.
        drafted: draft tokens in the bundle's own rounds.
        accepted: how many of them were accepted.
        dense_matches: of the drafts of the two-stage head, how many a dense head chooses as well, and how many were
            compared.
        problems: what is wrong with the cache, for people: by `SHIFTED`, `STALE` or `ROUNDED`.
        cache_error: error of the cache's worst row, relative to that row, and its tolerance.
    """

    def __init__(
        self, engine: GraphEngine, pair: Pair, faults: Sequence[Fault] = (), recipe: Recipe | None = None
    ) -> None:
        """Load what texts are compared with.

        Args:
            engine: runs the bundle, or the pair in eager torch.
            pair: the checkpoints.
            faults: the faults that are tried.
            recipe: how weights are stored; None for the bundle's.
        """
        manifest = engine.manifest
        recipe = recipe_of(manifest) if recipe is None else recipe
        self.engine, self.pair, self.faults, self.in_fp32 = engine, pair, faults, recipe.is_exact
        reference = Reference(pair, recipe, manifest.backend)
        drafter = reference.drafter(int8_activations=True)
        self._targets, self._drafters = {CORRECT: reference.target(int8_activations=True)}, {CORRECT: drafter}
        self.softcap = pair.drafter.text.final_logit_softcapping or pair.target.final_logit_softcapping
        if self.softcap is not None:
            self._drafters[SOFTCAP] = with_softcap(drafter, self.softcap)
        if pair.two_stage is not None:
            self._drafters[DENSE] = Reference(pair.dense, RECIPES["fp32"], manifest.backend).drafter()
        if not self.in_fp32:
            fp32 = Reference(pair, RECIPES["fp32"], manifest.backend)
            self._targets |= {UNROUNDED: reference.target(), FP32_TARGET: fp32.target()}
            self._drafters |= {UNROUNDED: reference.drafter(), FP32_DRAFTER: fp32.drafter()}
        self.answers: list[Tensor] = []
        self.rounds: dict[str, list[Tensor]] = defaultdict(list)
        self.drafted = self.accepted = 0
        self.dense_matches = (0, 0)
        self.cache_error = (0.0, MIN_TOLERANCE)
        self._values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self.problems: dict[str, str] = {}

    @property
    def num_texts(self) -> int:
        """How many texts were long enough for a round, and so count for acceptance."""
        return len(self.rounds[CORRECT])

    def add(self, prompt: Sequence[int], max_new_tokens: int, is_text: bool) -> None:
        """Let the bundle continue a prompt greedily, and measure on the result.

        Args:
            prompt: token ids.
            max_new_tokens: length limit of the continuation, in tokens.
            is_text: whether acceptance counts: it means nothing after a prompt of random ids.
        """
        continuation = continue_prompt(self.engine, prompt, max_new_tokens)
        outputs = {
            name: run_eager(target, continuation.text, continuation.start) for name, target in self._targets.items()
        }
        correct = outputs[CORRECT]
        unrounded, fp32 = outputs.get(UNROUNDED, correct), outputs.get(FP32_TARGET, correct)
        logits, ids = (part[continuation.start - 1 :] for part in bundle_logits(self.engine, continuation.text)[:2])
        suppressed = is_suppressed(logits)  # where fewer tokens are left than a bundle gives logits
        self._store(LOGITS, ACTUAL, logits.masked_fill(suppressed, 0))
        for name, eager in ((CORRECT, correct), (UNROUNDED, unrounded), (FP32_TARGET, fp32)):
            self._store(LOGITS, name, eager.logits.gather(1, ids).masked_fill(suppressed, 0))
        self._store(TOP_IDS, ACTUAL, ids[:, 0])
        self._store(TOP_IDS, FP32_TARGET, fp32.logits.argmax(1))
        for position, state in continuation.round_states:
            row = position - continuation.start
            self._store(ROUND_STATES, ACTUAL, state.unsqueeze(0))
            self._store(ROUND_STATES, CORRECT, correct.states[[row]])
            self._store(ROUND_STATES, UNROUNDED, unrounded.states[[row]])
            for fault in self.faults:
                if fault.change.before_norm:
                    self._store(ROUND_STATES, fault.label, correct.before_norm[[row]])
        self._check_cache(continuation, correct, unrounded)
        for probe in probes(self.engine, self.pair, continuation):
            self._add_probe(probe)
        if is_text:
            self.answers.append(torch.tensor(continuation.text[continuation.start :]))
            self.drafted, self.accepted = self.drafted + continuation.drafted, self.accepted + continuation.accepted
        if is_text and len(continuation.text) > continuation.start + DRAFT_STEPS:
            self._add_rounds(continuation, correct, fp32)

    def values(self, quantity: str) -> dict[str, Tensor]:
        """Return the values of a quantity by variant, with the bundle's as `ACTUAL`.

        Args:
            quantity: one of the constants `LOGITS`, `TOP_IDS`, `ROUND_STATES`, `NEXT_STATES` and `DRAFTS`.

        Returns:
            [rows, columns] float32, or [rows] int64 for token ids.
        """
        return {name: torch.cat(parts) for (key, name), parts in self._values.items() if key == quantity}

    def acceptance_rate(self, variant: str) -> float:
        """Return a variant's accepted drafts over its proposed drafts."""
        rounds = torch.cat(self.rounds[variant])
        return float(rounds.sum()) / (len(rounds) * DRAFT_STEPS)

    @property
    def dense_baseline(self) -> str:
        """The variant that differs from `DENSE` in the head alone, and not in rounding."""
        return CORRECT if self.in_fp32 else FP32_DRAFTER

    def gain(self, variant: str, baseline: str = CORRECT) -> tuple[float, float]:
        """Return how much more of the drafts a variant accepts than a baseline, and the standard error of that."""
        return acceptance_gain(self.rounds[baseline], self.rounds[variant], DRAFT_STEPS)

    def _store(self, quantity: str, name: str, rows: Tensor) -> None:
        self._values[quantity, name].append(rows)

    def _check_cache(self, continuation: Continuation, correct: EagerOutputs, unrounded: EagerOutputs) -> None:
        """Find the first snapshot with wrong rows, and why they are wrong; errors in later ones follow from it."""
        rounding = max(float(row_distances(a, b).max()) for a, b in zip(unrounded.kv, correct.kv, strict=True))
        tolerance, kv = error_tolerance(rounding), dict(zip(continuation.snapshots[0].rows, correct.kv, strict=True))
        for snapshot in continuation.snapshots:
            if snapshot.position != snapshot.tokens:
                counts = f"{snapshot.tokens} tokens are in the text, the runtime is at position {snapshot.position}"
                self.problems.setdefault(STALE, f"after a round {counts}")
                return
            overwritten, errors = row_errors(snapshot, snapshot.written), row_errors(snapshot, kv)
            worst = float(errors.max()), tolerance
            self.cache_error = max(self.cache_error, worst, key=lambda error: error[0] / error[1])
            # Rows of another position can come from the graph or the runtime, so they are compared with eager torch.
            # All else is compared with what the target wrote: errors in that are the target's, not the cache's.
            shifted = {shift: float(row_errors(snapshot, kv, shift).median()) for shift in (1, -1)}
            shift, closest = min(shifted.items(), key=lambda item: item[1])
            if len(errors) > 2 and float(errors.median()) > max(tolerance, 3 * closest):
                way = "down" if shift > 0 else "up"
                error = f"{closest:.1e} off eager torch with that shift"
                self.problems[SHIFTED] = f"the cache's rows lie 1 too far {way}: {error}"
                return
            if not overwritten.any():
                continue
            wrong = overwritten[overwritten > 0]
            error = f"off what the target wrote by {float(wrong.median()):.1e}"
            if float(wrong.median()) > MAX_ROUNDING_ERROR:
                which = f"{len(wrong)} of the cache's newest {len(errors)} rows"
                self.problems.setdefault(STALE, f"{which} are not what the accepted tokens wrote: {error}")
            else:
                dtype = narrower_dtype([rows for _, rows in snapshot.rows.values()])
                what = f"every number is a {dtype}" if dtype else "numbers are close"
                self.problems.setdefault(ROUNDED, f"{what}, {error}")
            return

    def _add_probe(self, probe: Probe) -> None:
        self._store(NEXT_STATES, ACTUAL, probe.next_states)
        self._store(DRAFTS, ACTUAL, probe.drafts)
        count = len(probe.tokens)
        inputs = probe.tokens, probe.states, torch.full((count,), probe.position), torch.arange(count)
        window_start, correct = torch.tensor([probe.window_start]), self._drafters[CORRECT]

        def run(name: str, drafter: Drafter, change: Change = Change()) -> None:
            hidden, states = changed_step(change)(drafter, *inputs, window_start, probe.kv)
            self._store(NEXT_STATES, name, states)
            self._store(DRAFTS, name, drafter.head(hidden))

        for name in (CORRECT, UNROUNDED, SOFTCAP):
            if name in self._drafters:
                run(name, self._drafters[name])
        for fault in self.faults:
            if not fault.change.before_norm:
                run(fault.label, correct, fault.change)

    def _add_rounds(self, continuation: Continuation, correct: EagerOutputs, fp32: EagerOutputs) -> None:
        """Run a round at every position of the answer that has enough tokens after it, with each variant."""
        text, start = torch.tensor(continuation.text), continuation.start
        positions = torch.arange(start, len(text) - DRAFT_STEPS)
        tokens, following = text[positions], positions.unsqueeze(1) + torch.arange(1, DRAFT_STEPS + 1)
        drafters, shared = self._drafters, correct.shared(self.pair)

        def run(
            drafter: Drafter, states: Tensor, kv: KV, expected: Tensor, change: Change = Change()
        ) -> tuple[Tensor, Tensor, Tensor]:
            parts, step = [], changed_step(change)
            for rows in torch.arange(len(tokens)).split(PREFILL_CHUNK_TOKENS):
                parts.append(draft_rounds(drafter, tokens[rows], states[rows], positions[rows], kv, step))
            hidden, drafts = (torch.cat(part) for part in zip(*parts, strict=True))
            return (drafts == expected).cumprod(1).sum(1), hidden.flatten(0, 1), drafts.flatten()

        expected = text[following]
        for name in (CORRECT, SOFTCAP, DENSE, FP32_DRAFTER):
            if name in drafters:
                accepted, hidden, drafts = run(drafters[name], correct.states, shared, expected)
                self.rounds[name].append(accepted)
                if name == self.dense_baseline and DENSE in drafters:
                    dense = torch.cat([drafters[DENSE].head(rows) for rows in hidden.split(PREFILL_CHUNK_TOKENS)])
                    matches, compared = self.dense_matches
                    self.dense_matches = matches + int((dense == drafts).sum()), compared + len(drafts)
        for fault in self.faults:
            if not fault.change.sees_ahead:
                states = correct.before_norm if fault.change.before_norm else correct.states
                accepted, _, _ = run(drafters[CORRECT], states, shared, expected, fault.change)
                self.rounds[fault.label].append(accepted)
        if not self.in_fp32:
            # Where the float32 target would choose another token than the text has, its later choices still follow the
            # text. That makes its acceptance a little lower than it is, never higher.
            chosen = fp32.logits.argmax(1)[following - start]
            for name, drafter in ((FP32_TARGET, CORRECT), (FP32_BOTH, FP32_DRAFTER)):
                accepted, _, _ = run(drafters[drafter], fp32.states, fp32.shared(self.pair), chosen)
                self.rounds[name].append(accepted)
