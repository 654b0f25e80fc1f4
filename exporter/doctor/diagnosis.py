"""Find out why acceptance is low, with an experiment for each known fault.

A fault of the bundle shows in values: its outputs are closer to eager torch with the fault than to eager torch without.
A fault of the pair shows in acceptance: more drafts are accepted in eager torch with the fault than without, because
the drafter was trained that way.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.doctor.drafter_fit import Gain, against_base, drafting_gain, measured_costs, new_tokens
from exporter.doctor.faults import FAULTS, ROWS, STATE, WINDOW
from exporter.doctor.study import (
    ACTUAL,
    CORRECT,
    DENSE,
    DRAFTS,
    FP32_BOTH,
    FP32_DRAFTER,
    FP32_TARGET,
    LOGITS,
    NEXT_STATES,
    ROUND_STATES,
    ROUNDED,
    SHIFTED,
    SOFTCAP,
    STALE,
    TOP_IDS,
    UNROUNDED,
    Study,
)
from exporter.doctor.template import check_template
from exporter.doctor.verdicts import (
    FINDING,
    PASS,
    SKIPPED,
    Experiment,
    Fit,
    best_fit,
    error_tolerance,
    is_clear_gain,
    relative_distances,
    root_mean_square,
)
from exporter.parity.drafting import DRAFT_STEPS
from exporter.parity.reference import Reference
from exporter.parity.stages import Note, default_prompts, read_comparable
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

SAMPLED_TEXTS = 8  # begin with tokens that the target samples, so that they differ
SAMPLED_TOKENS = 12  # at the beginning of each of them
NO_TEXT = "the texts are too short to draft on; raise --max-new-tokens, or export with a larger --max-seq-len"

# Drafts may differ from eager torch's by chance, where logits tie: this fraction of them where no activation is
# rounded, and a softcap must explain more than this many drafts.
MAX_DIFFERING_FRACTION = 0.05
MAX_TIED_DRAFTS = 2


@dataclass(frozen=True)
class Diagnosis:
    """The results of all experiments.

    Attributes:
        experiments: one for each known cause.
        acceptance_rate: the bundle's accepted drafts over its proposed drafts, in rounds of up to four drafts; None if
            it proposed none.
        gain: what drafting gains on this machine; None if no text was long enough for a round.
    """

    experiments: list[Experiment]
    acceptance_rate: float | None
    gain: Gain | None = None

    @property
    def findings(self) -> list[Experiment]:
        """The experiments that found a cause, the most likely first: faults of the bundle, then by gain."""
        findings = [e for e in self.experiments if e.verdict == FINDING]
        return sorted(findings, key=lambda e: -e.figures.get("gain", 1.0))


def run_doctor(
    bundle: Path,
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    note: Note = lambda _: None,
    base: Pair | None = None,
) -> Diagnosis:
    """Open a bundle and run every experiment on it.

    Args:
        bundle: a directory that `export` wrote.
        pair: the checkpoints that it was made from.
        prompts: token ids of text; if empty, the target generates text after the beginning-of-text token, and random
            prompts are used where only values count.
        max_new_tokens: length limit of each answer, in tokens.
        note: called with a description of each step that begins.
        base: the target before it was trained further, with the same drafter; None to compare with none.

    Raises:
        InputError: the bundle cannot be read or run, was exported without drafts, or is of other shapes than the pair;
            or the answers are too short to draft in.
    """
    manifest = read_comparable(bundle, pair, prompts)
    if not manifest.max_draft_tokens:
        raise InputError(f"{bundle}: was exported without drafts; export it with --max-draft-tokens 4 or more")
    diagnosis = diagnose(load_engine(bundle, manifest, threads=1), pair, prompts, max_new_tokens, note, base)
    template = check_template(bundle, pair.target_checkpoint.directory, prompts)
    return replace(diagnosis, experiments=[*diagnosis.experiments, template])


@torch.no_grad()
def diagnose(
    engine: GraphEngine,
    pair: Pair,
    prompts: Sequence[Sequence[int]] = (),
    max_new_tokens: int = 64,
    note: Note = lambda _: None,
    base: Pair | None = None,
) -> Diagnosis:
    """Run every experiment that needs only an engine: all but the chat template's.

    Args:
        engine: runs the bundle.
        pair: see `run_doctor`.
        prompts: see `run_doctor`.
        max_new_tokens: see `run_doctor`.
        note: see `run_doctor`.
        base: see `run_doctor`.

    Raises:
        InputError: the answers are too short to draft in.
    """
    study, manifest = Study(engine, pair, FAULTS), engine.manifest
    random = [] if prompts else default_prompts(manifest)
    starts = prompts or [[min(manifest.bos, manifest.vocab_size - 1)]]
    total = len(prompts) + len(random) + SAMPLED_TEXTS
    beginnings = []
    for number in range(total):
        note(f"text {number + 1} of {total}")
        seed = number - len(prompts) - len(random)
        is_sampled = seed >= 0
        is_text = is_sampled or bool(prompts)
        text = _sampled_text(engine, starts[seed % len(starts)], seed) if is_sampled else [*prompts, *random][number]
        study.add(text, max_new_tokens, is_text)
        beginnings += [text] if is_text else []
    if not (study.values(ROUND_STATES) and study.values(NEXT_STATES)):
        missing = f"no text had {min(DRAFT_STEPS, manifest.max_draft_tokens) + 1} tokens after its prompt"
        raise InputError(f"{missing}; pass shorter or other --prompt-ids, or export with a larger --max-seq-len")
    experiments = [*_experiments(study), new_tokens(study)]
    if base is not None:
        fp32 = RECIPES["fp32"]
        before = Study(Reference(base, fp32, manifest.backend).engine(manifest), base, recipe=fp32)
        known = [text for text in beginnings if max(text) < base.target.vocab_size]
        for number, beginning in enumerate(known, 1):
            note(f"text {number} of {len(known)} with the target before its training")
            before.add(beginning, max_new_tokens, is_text=True)
        experiments.append(against_base(study, before))
    gain = None
    if study.num_texts:
        gain = drafting_gain(study.rounds[CORRECT], measured_costs(engine, beginnings), manifest.max_draft_tokens)
    return Diagnosis(experiments, study.accepted / study.drafted if study.drafted else None, gain)


def _sampled_text(engine: GraphEngine, start: Sequence[int], seed: int) -> list[int]:
    """Return a prompt and a few tokens that the target samples after it, up to an end token.

    After the beginning-of-text token alone this is text like the target's training data, different for each seed. Half
    of a small context is left to draft in.
    """
    room = (engine.manifest.max_seq_len - len(start)) // 2
    tokens = generate(engine, start, Options(SAMPLED_TOKENS, 0, Sampling(1.0, seed=seed)), Stats())
    return [*start, *(token for token in islice(tokens, room) if token not in engine.manifest.eos)]


def _experiments(study: Study) -> Iterator[Experiment]:
    logits, states, steps = (_fit(study, quantity) for quantity in (LOGITS, ROUND_STATES, NEXT_STATES))
    # A wrong cache or a wrong target also makes states wrong; those have experiments of their own.
    explained = bool(study.problems) or logits.error > logits.tolerance
    for name in dict.fromkeys(fault.experiment for fault in FAULTS):
        result = _known_faults(study, name, states if name == STATE else steps)
        if name == STATE and states.best is None and states.error > states.tolerance and not explained:
            error = f"{states.error:.1e} off (allowed {states.tolerance:.0e})"
            detail = f"rounds start neither from this state nor from the one before the norm: {error}"
            result = replace(result, verdict=FINDING, detail=detail)
        if name == ROWS and (problem := study.problems.get(SHIFTED) or study.problems.get(STALE)):
            result = replace(result, verdict=FINDING, detail=problem)
        yield result
    softcap = _softcap(study, steps)
    yield softcap
    yield _head(study, steps, explained=softcap.verdict == FINDING)
    yield _target(study, logits)
    yield _drafter(study, steps)
    yield _precision(study, "precision of both", FP32_BOTH)
    unchanged = "as the target wrote it, {:.0e} off eager torch at most (allowed {:.0e})".format(*study.cache_error)
    problem = study.problems.get(ROUNDED)
    yield Experiment("precision of the KV cache", FINDING if problem else PASS, problem or unchanged)


def _fit(study: Study, quantity: str) -> Fit:
    """Find the fault that the bundle's values fit best, if any; the tolerance follows the rounding of activations."""
    values = study.values(quantity)
    correct = values[CORRECT]
    rounding = root_mean_square(relative_distances(values.get(UNROUNDED, correct), correct, correct))
    faulty = {fault.label: values[fault.label] for fault in FAULTS if fault.label in values}
    return best_fit(values[ACTUAL], correct, faulty, error_tolerance(rounding))


def _known_faults(study: Study, name: str, fit: Fit) -> Experiment:
    """Judge the faults of one experiment, by values and by acceptance."""
    labels = [fault.label for fault in FAULTS if fault.experiment == name]
    figures = {"error": fit.error}
    if fit.best in labels:
        errors = f"{fit.best_error:.1e} off eager torch with that fault, {fit.error:.1e} without"
        figures["error_otherwise"] = fit.best_error
        return Experiment(name, FINDING, f"the bundle drafts as if {fit.best}: {errors}", figures)
    by_acceptance = [label for label in labels if label in study.rounds]
    prefix = ""
    if by_acceptance:
        best = max(by_acceptance, key=lambda label: study.gain(label)[0])
        clear, accepted, more_figures = _acceptance(study, best, f"if {best}")
        figures |= more_figures
        if clear:
            return Experiment(name, FINDING, f"{accepted}: the drafter was trained that way", figures)
        prefix = f"{accepted}; "
    changing = [label for label in labels if label in fit.effects]
    if not changing:
        why = "no text is longer than it" if name == WINDOW else "it changes nothing on these texts"
        return Experiment(name, SKIPPED, f"not exercised: {why}", figures)
    visible = [label for label in changing if fit.is_visible(label)]
    min_effect, away = min(fit.effects[label] for label in visible or changing)
    figures["least_change"] = min_effect
    if not visible:
        return Experiment(name, SKIPPED, f"{prefix}a fault changes {min_effect:.0e}, rounding {away:.0e}", figures)
    detail = f"{prefix}{away:.0e} off eager torch, {min_effect:.0e} or more with a fault"
    return Experiment(name, PASS, detail, figures)


def _acceptance(
    study: Study, variant: str, condition: str, baseline: str = CORRECT
) -> tuple[bool, str, dict[str, float]]:
    """Return whether a variant accepts clearly more, a detail that ends in the condition, and the figures."""
    gain, standard_error = study.gain(variant, baseline)
    without, with_variant = study.acceptance_rate(baseline), study.acceptance_rate(variant)
    figures = {"acceptance": without, "acceptance_otherwise": with_variant, "standard_error": standard_error}
    if is_clear_gain(gain, standard_error, study.num_texts):
        detail = f"drafts are accepted {with_variant:.1%} instead of {without:.1%} {condition}"
        return True, detail, figures | {"gain": gain}
    return False, f"{without:.1%} of drafts accepted, {with_variant:.1%} {condition}", figures


def _softcap(study: Study, steps: Fit) -> Experiment:
    """Judge whether the bundle's drafter softcaps its logits, which makes ties, or should."""
    name, cap = "softcap in the drafter", study.softcap
    if cap is None:
        return Experiment(name, SKIPPED, "neither config has final_logit_softcapping")
    drafts = study.values(DRAFTS)
    changed = drafts[SOFTCAP] != drafts[CORRECT]
    num_changed = int(changed.sum())
    as_with, as_without = (int((changed & (drafts[ACTUAL] == drafts[v])).sum()) for v in (SOFTCAP, CORRECT))
    figures = {
        "softcap": cap,
        "drafts_changed": float(num_changed),
        "as_with_it": float(as_with),
        "as_without": float(as_without),
    }
    if steps.best is None and as_with > as_without + MAX_TIED_DRAFTS:
        detail = f"a softcap of {cap:g} makes ties of logits: of {num_changed} drafts that it changes {as_with} are as"
        return Experiment(name, FINDING, f"{detail} with it, {as_without} as without", figures)
    prefix = ""
    if study.num_texts:
        clear, accepted, more_figures = _acceptance(study, SOFTCAP, f"with a softcap of {cap:g}")
        figures |= more_figures
        if clear:
            return Experiment(name, FINDING, accepted, figures)
        prefix = f"{accepted}; "
    if not num_changed:
        return Experiment(name, SKIPPED, f"{prefix}not exercised: {cap:g} changes none of the bundle's drafts", figures)
    detail = f"{prefix}of {num_changed} drafts that it changes {as_without} are as without it"
    return Experiment(name, PASS, detail, figures)


def _head(study: Study, steps: Fit, explained: bool) -> Experiment:
    """Judge whether drafts are those of the reference's head, and how many more a dense head would get accepted."""
    name, drafts = "clusters of the head", study.values(DRAFTS)
    actual, correct = drafts[ACTUAL], drafts[CORRECT]
    rounding = _differing_fraction(drafts.get(UNROUNDED, correct), correct)
    tolerance = max(MAX_DIFFERING_FRACTION, error_tolerance(rounding))
    differing = _differing_fraction(actual, correct)
    figures = {"drafts_differ": differing}
    if differing > tolerance and steps.best is None and steps.error <= steps.tolerance and not explained:
        detail = f"{differing:.0%} of drafts (allowed {tolerance:.0%}) are not those that this head chooses for the"
        return Experiment(name, FINDING, f"{detail} drafter's states", figures)
    if study.pair.two_stage is None:
        return Experiment(name, PASS, f"none, the head is dense; {differing:.0%} of drafts differ from it", figures)
    if not study.num_texts:
        return Experiment(name, SKIPPED, NO_TEXT, figures)
    clear, accepted, more_figures = _acceptance(study, DENSE, "with a dense head", study.dense_baseline)
    matches, compared = study.dense_matches
    figures |= more_figures | {"recall": matches / compared}
    detail = f"{accepted}; {matches / compared:.1%} of best tokens are in kept clusters"
    if clear:
        return Experiment(name, FINDING, f"{detail}; make other clusters or keep more, with `cluster`", figures)
    return Experiment(name, PASS, detail, figures)


def _differing_fraction(actual: Tensor, expected: Tensor) -> float:
    return float((actual != expected).double().mean())


def _target(study: Study, logits: Fit) -> Experiment:
    """Judge the precision of the target, with its noise and choices compared with float32."""
    actual, fp32 = (study.values(LOGITS)[name].double() for name in (ACTUAL, FP32_TARGET))
    noise = float((actual - fp32).square().sum())
    sqnr_db = 10 * math.log10(float(fp32.square().sum()) / noise) if noise else math.inf
    equal = 1 - _differing_fraction(*(study.values(TOP_IDS)[name] for name in (ACTUAL, FP32_TARGET)))
    prefix = f"{sqnr_db:.0f} dB above noise, {equal:.1%} of choices as in fp32; "
    figures = {"sqnr_db": sqnr_db, "equal_choices": equal}
    result = _precision(study, "precision of the target", FP32_TARGET, prefix, figures)
    return result if study.problems else _within_tolerance(study, result, logits)


def _drafter(study: Study, steps: Fit) -> Experiment:
    result = _precision(study, "precision of the drafter", FP32_DRAFTER)
    return result if steps.best else _within_tolerance(study, result, steps)


def _precision(
    study: Study, name: str, variant: str, prefix: str = "", figures: dict[str, float] | None = None
) -> Experiment:
    """Judge what the recipe costs in accepted drafts."""
    figures = figures or {}
    if study.in_fp32:
        return Experiment(name, PASS, f"{prefix}the recipe is fp32", figures)
    if not study.num_texts:
        return Experiment(name, SKIPPED, f"{prefix}{NO_TEXT}", figures)
    clear, accepted, more_figures = _acceptance(study, variant, f"with {variant}")
    return Experiment(name, FINDING if clear else PASS, prefix + accepted, figures | more_figures)


def _within_tolerance(study: Study, result: Experiment, fit: Fit) -> Experiment:
    """Make an experiment a finding if the bundle is further from its recipe than rounding explains."""
    figures = result.figures | {"error": fit.error}
    if fit.error <= fit.tolerance:
        return replace(result, figures=figures)
    figures.pop("gain", None)
    error = f"{fit.error:.1e} off its recipe in eager torch (allowed {fit.tolerance:.0e})"
    detail = f"{error}, and it fits no known fault; see `parity`; {result.detail}"
    return replace(result, verdict=FINDING, detail=detail, figures=figures)
