"""Why is acceptance low? Each experiment compares a bundle and its pair with what they would be with a known fault.

A fault of the bundle shows in values: its outputs are those of eager torch with the fault, not those without. A fault
of the pair shows in acceptance: eager torch with the "fault" has more drafts accepted than without.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.doctor.faults import FAULTS, ROWS, STATE, WINDOW
from exporter.doctor.study import (
    AS_IT_SHOULD,
    CHOICES,
    DENSE,
    DRAFTS,
    FOUND,
    FP32_BOTH,
    FP32_DRAFTER,
    FP32_TARGET,
    LOGITS,
    NUMBERS,
    SHIFTED,
    SOFTCAP,
    STALE,
    STATES,
    STEPS,
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
    allowed,
    best_fit,
    distances,
    is_clear,
    mean,
)
from exporter.parity.drafting import DRAFT_STEPS
from exporter.parity.stages import Note, default_prompts, read_comparable
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

# Texts that begin with a few sampled tokens, so that they differ.
OPENINGS, OPENING = 8, 12
NO_TEXT = "the texts are too short to draft on; raise --max-new-tokens, or export with a larger --max-seq-len"

# Drafts that may differ where no activation is rounded, and how many more must fit a softcap than not: ties.
SOME_DRAFTS, MIN_DRAFTS = 0.05, 2


@dataclass(frozen=True)
class Diagnosis:
    """What was found; `acceptance_rate` is the bundle's own, in rounds of up to four drafts."""

    experiments: list[Experiment]
    acceptance_rate: float | None

    @property
    def findings(self) -> list[Experiment]:
        """The most likely cause first: faults of the bundle, then what would gain most."""
        found = [e for e in self.experiments if e.verdict == FINDING]
        return sorted(found, key=lambda e: -e.figures.get("gain", 1.0))


def run_doctor(
    bundle: Path, pair: Pair, prompts: Sequence[Sequence[int]], max_new_tokens: int, note: Note = lambda _: None
) -> Diagnosis:
    """Open a bundle and try every experiment on it.

    Args:
        pair: the checkpoints that it was made from.
        prompts: token ids of text; empty for what the target writes by itself, and random ids for values alone.
        note: told what is being done.

    Raises:
        InputError: the bundle cannot be read or run, or is of other shapes than the pair.
    """
    manifest = read_comparable(bundle, pair, prompts)
    if not manifest.max_draft_tokens:
        raise InputError(f"{bundle}: was exported for no drafts; export it with --max-draft-tokens 4 or more")
    found = diagnose(load_engine(bundle, manifest, threads=1), pair, prompts, max_new_tokens, note)
    template = check_template(bundle, pair.target_checkpoint.directory, prompts)
    return Diagnosis([*found.experiments, template], found.acceptance_rate)


@torch.no_grad()
def diagnose(
    engine: GraphEngine,
    pair: Pair,
    prompts: Sequence[Sequence[int]] = (),
    max_new_tokens: int = 64,
    note: Note = lambda _: None,
) -> Diagnosis:
    """Every experiment that needs an engine and nothing else of the bundle; see `run_doctor`."""
    study, manifest = Study(engine, pair, FAULTS), engine.manifest
    random = [] if prompts else default_prompts(manifest)
    starts = prompts or [[min(manifest.bos, manifest.vocab_size - 1)]]
    total = len(prompts) + len(random) + OPENINGS
    for number in range(total):
        note(f"text {number + 1} of {total}")
        seed = number - len(prompts) - len(random)
        if seed < 0:
            study.add([*prompts, *random][number], max_new_tokens, is_text=bool(prompts))
        else:
            study.add(_opened(engine, starts[seed % len(starts)], seed), max_new_tokens, is_text=True)
    if not (study.values(STATES) and study.values(STEPS)):
        needed = f"no text had {min(DRAFT_STEPS, manifest.max_draft_tokens) + 1} tokens after its prompt"
        raise InputError(f"{needed}; pass shorter or other --prompt-ids, or export with a larger --max-seq-len")
    return Diagnosis(list(_experiments(study)), study.accepted / study.drafted if study.drafted else None)


def _opened(engine: GraphEngine, start: Sequence[int], seed: int) -> list[int]:
    """A prompt and the first tokens of an answer that the target samples, up to an end token.

    After the beginning-of-text token alone that is text like the target was trained on, another for each seed. Of a
    small context half is left to draft in.
    """
    room = (engine.manifest.max_seq_len - len(start)) // 2
    tokens = generate(engine, start, Options(OPENING, 0, Sampling(1.0, seed=seed)), Stats())
    return [*start, *(token for token in islice(tokens, room) if token not in engine.manifest.eos)]


def _experiments(study: Study) -> Iterator[Experiment]:
    logits, states, steps = (_fit(study, kind) for kind in (LOGITS, STATES, STEPS))
    # What a wrong cache or a wrong target leads to is not told once more.
    known = bool(study.problems) or logits.error > logits.limit
    for name in dict.fromkeys(fault.experiment for fault in FAULTS):
        found = _judge(study, name, states if name == STATE else steps)
        if name == STATE and states.best is None and states.error > states.limit and not known:
            detail = f"rounds start from a state that is neither: {states.error:.1e} off (allowed {states.limit:.0e})"
            found = replace(found, verdict=FINDING, detail=detail)
        if name == ROWS and (problem := study.problems.get(SHIFTED) or study.problems.get(STALE)):
            found = replace(found, verdict=FINDING, detail=problem)
        yield found
    softcap = _softcap(study, steps)
    yield softcap
    yield _head(study, steps, known=softcap.verdict == FINDING)
    yield _target(study, logits)
    yield _drafter(study, steps)
    yield _in_fp32(study, "precision of both", FP32_BOTH)
    told = "as the target wrote it, {:.0e} off eager torch at most (allowed {:.0e})".format(*study.cache_error)
    problem = study.problems.get(NUMBERS)
    yield Experiment("precision of the KV cache", FINDING if problem else PASS, problem or told)


def _fit(study: Study, kind: str) -> Fit:
    """Which fault the bundle's values fit, if not none; allowed is what rounding does to eager torch's, and more."""
    values = study.values(kind)
    right = values[AS_IT_SHOULD]
    limit = allowed(mean(distances(values.get(UNROUNDED, right), right, right)))
    faulty = {fault.label: values[fault.label] for fault in FAULTS if fault.label in values}
    return best_fit(values[FOUND], right, faulty, limit)


def _judge(study: Study, name: str, fit: Fit) -> Experiment:
    """The faults of one experiment, by values and by acceptance."""
    labels = [fault.label for fault in FAULTS if fault.experiment == name]
    figures = {"error": fit.error}
    if fit.best in labels:
        detail = f"the bundle drafts as if {fit.best}: {fit.best_error:.1e} off eager torch so, {fit.error:.1e} else"
        return Experiment(name, FINDING, detail, figures | {"error_otherwise": fit.best_error})
    tried = [label for label in labels if label in study.rounds]
    told = ""
    if tried:
        best = max(tried, key=lambda label: study.gain(label)[0])
        clear, told, accepted = _acceptance(study, best, f"if {best}")
        figures |= accepted
        if clear:
            return Experiment(name, FINDING, f"{told}: the drafter was made for that", figures)
        told += "; "
    changing = [label for label in labels if label in fit.moved]
    if not changing:
        why = "no text reaches past it" if name == WINDOW else "it changes nothing on these texts"
        return Experiment(name, SKIPPED, f"not exercised: {why}", figures)
    seen = [label for label in changing if fit.shows(label)]
    least, away = min(fit.moved[label] for label in seen or changing)
    figures["least_change"] = least
    if not seen:
        return Experiment(name, SKIPPED, f"{told}a fault changes {least:.0e}, rounding {away:.0e}", figures)
    return Experiment(name, PASS, f"{told}{away:.0e} off eager torch, {least:.0e} or more with a fault", figures)


def _acceptance(study: Study, variant: str, how: str, beside: str = AS_IT_SHOULD) -> tuple[bool, str, dict[str, float]]:
    """Whether a variant accepts clearly more, what people are told of it, and the figures."""
    gain, standard_error = study.gain(variant, beside)
    right, other = study.share(beside), study.share(variant)
    figures = {"acceptance": right, "acceptance_otherwise": other, "standard_error": standard_error}
    if is_clear(gain, standard_error, study.texts):
        return True, f"drafts are accepted {other:.1%} instead of {right:.1%} {how}", figures | {"gain": gain}
    return False, f"{right:.1%} of drafts accepted, {other:.1%} {how}", figures


def _softcap(study: Study, steps: Fit) -> Experiment:
    name, cap = "softcap in the drafter", study.softcap
    if cap is None:
        return Experiment(name, SKIPPED, "neither config has final_logit_softcapping")
    drafts = study.values(DRAFTS)
    differ = drafts[SOFTCAP] != drafts[AS_IT_SHOULD]
    count, capped, free = (
        int((differ & same).sum())
        for same in (differ, drafts[FOUND] == drafts[SOFTCAP], drafts[FOUND] == drafts[AS_IT_SHOULD])
    )
    figures = {"softcap": cap, "drafts_changed": float(count), "as_with_it": float(capped), "as_without": float(free)}
    if steps.best is None and capped > free + MIN_DRAFTS:
        detail = f"a softcap of {cap:g} makes ties of logits: of {count} drafts that it changes {capped} are as with it"
        return Experiment(name, FINDING, f"{detail}, {free} as without", figures)
    told = ""
    if study.texts:
        clear, told, accepted = _acceptance(study, SOFTCAP, f"with a softcap of {cap:g}")
        figures |= accepted
        if clear:
            return Experiment(name, FINDING, told, figures)
        told += "; "
    if not count:
        return Experiment(name, SKIPPED, f"{told}not exercised: {cap:g} changes no draft of the bundle's", figures)
    return Experiment(name, PASS, f"{told}of {count} drafts that it changes {free} are as without it", figures)


def _head(study: Study, steps: Fit, known: bool) -> Experiment:
    """Whether drafts are those of the reference's head, and what clusters cost beside a dense one."""
    name, drafts = "clusters of the head", study.values(DRAFTS)
    found, right = drafts[FOUND], drafts[AS_IT_SHOULD]
    limit = max(SOME_DRAFTS, allowed(_differing(drafts.get(UNROUNDED, right), right)))
    differing = _differing(found, right)
    figures = {"drafts_differ": differing}
    if differing > limit and steps.best is None and steps.error <= steps.limit and not known:
        detail = f"{differing:.0%} of drafts (allowed {limit:.0%}) are not what this head makes of the drafter's states"
        return Experiment(name, FINDING, detail, figures)
    if study.pair.two_stage is None:
        return Experiment(name, PASS, f"none, the head is dense; {differing:.0%} of drafts differ from it", figures)
    if not study.texts:
        return Experiment(name, SKIPPED, NO_TEXT, figures)
    clear, told, accepted = _acceptance(study, DENSE, "with a dense head", study.clustered)
    kept, total = study.recall
    figures |= accepted | {"recall": kept / total}
    told += f"; {kept / total:.1%} of best tokens survive"
    if clear:
        return Experiment(name, FINDING, f"{told}; make other clusters or keep more, with `cluster`", figures)
    return Experiment(name, PASS, told, figures)


def _differing(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).double().mean())


def _target(study: Study, logits: Fit) -> Experiment:
    found, full = (study.values(LOGITS)[name].double() for name in (FOUND, FP32_TARGET))
    noise = float((found - full).square().sum())
    sqnr = 10 * math.log10(float(full.square().sum()) / noise) if noise else math.inf
    equal = 1 - _differing(*(study.values(CHOICES)[name] for name in (FOUND, FP32_TARGET)))
    told = f"{sqnr:.0f} dB above noise, {equal:.1%} of choices as in fp32; "
    figures = {"sqnr_db": sqnr, "equal_choices": equal}
    found_so = _in_fp32(study, "precision of the target", FP32_TARGET, told, figures)
    return found_so if study.problems else _precise(study, found_so, logits)


def _drafter(study: Study, steps: Fit) -> Experiment:
    found = _in_fp32(study, "precision of the drafter", FP32_DRAFTER)
    return found if steps.best else _precise(study, found, steps)


def _in_fp32(
    study: Study, name: str, variant: str, told: str = "", figures: dict[str, float] | None = None
) -> Experiment:
    """What the recipe costs in accepted drafts."""
    figures = figures or {}
    if study.in_fp32:
        return Experiment(name, PASS, f"{told}the recipe is fp32", figures)
    if not study.texts:
        return Experiment(name, SKIPPED, f"{told}{NO_TEXT}", figures)
    clear, accepted, more = _acceptance(study, variant, f"with {variant}")
    return Experiment(name, FINDING if clear else PASS, told + accepted, figures | more)


def _precise(study: Study, found: Experiment, fit: Fit) -> Experiment:
    """A finding if the bundle is further from its recipe than rounding explains."""
    figures = found.figures | {"error": fit.error}
    if fit.error <= fit.limit:
        return replace(found, figures=figures)
    figures.pop("gain", None)
    detail = f"{fit.error:.1e} off its recipe in eager torch (allowed {fit.limit:.0e}), and it fits no known fault;"
    return replace(found, verdict=FINDING, detail=f"{detail} see `parity`; {found.detail}", figures=figures)
