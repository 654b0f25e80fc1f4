"""Whether a drafter fits a target that was trained further, and what drafting gains on this machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair, open_pair
from exporter.doctor.study import CORRECT, FP32_BOTH, Study
from exporter.doctor.verdicts import FINDING, MIN_GAIN, MIN_TEXTS, PASS, SKIPPED, Experiment
from exporter.parity.drafting import DRAFT_STEPS
from runtime_ref.costs import DRAFTER, Costs
from runtime_ref.decoder import Options, generate
from runtime_ref.draft_length import DraftLength
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.stats import Stats

MEASURED_TOKENS = 64  # of each text with which passes are timed

# A fall in acceptance since a training must be this many standard errors over texts. It is one comparison, where
# `exporter.doctor.verdicts` has a dozen: by chance a healthy pair has a finding in less than one case of fifty.
MIN_STANDARD_ERRORS = 3


@dataclass(frozen=True)
class Gain:
    """What drafting gains, by the acceptance that was measured and the times of passes on this machine.

    Attributes:
        num_draft_tokens: the best K; 0 if plain decoding is the fastest.
        times_faster: speed with it, over that of plain decoding.
    """

    num_draft_tokens: int
    times_faster: float

    def __str__(self) -> str:
        if not self.num_draft_tokens:
            return "drafting gains nothing on these texts on this machine; `auto` switches it off"
        best = f"{self.times_faster:.2f} times as fast as plain decoding here, with K = {self.num_draft_tokens}"
        return f"drafting is {best}"


def drafting_gain(rounds: Sequence[Tensor], costs: Costs, max_drafts: int) -> Gain:
    """Return the best number of drafts and what it gains.

    Args:
        rounds: for each text, accepted drafts of rounds of `DRAFT_STEPS` drafts, [rounds] int64.
        costs: times of passes and draft steps.
        max_drafts: the largest K to consider.
    """
    accepted, best, tokens = torch.cat(list(rounds)), Gain(0, 1.0), 1.0
    for drafts in range(1, min(DRAFT_STEPS, max_drafts) + 1):
        tokens += float((accepted >= drafts).double().mean())
        times_faster = tokens / costs.relative(DRAFTER, drafts)
        if times_faster > best.times_faster:
            best = Gain(drafts, times_faster)
    return best


def measured_costs(engine: GraphEngine, beginnings: Sequence[Sequence[int]]) -> Costs:
    """Time passes and draft steps while texts are generated.

    Args:
        engine: runs the bundle.
        beginnings: token ids that texts begin with.
    """
    manifest = engine.manifest
    costs = Costs(manifest.max_draft_tokens, manifest.row_multiple)
    planner = DraftLength(manifest.max_draft_tokens, costs)
    for beginning in beginnings:
        list(generate(engine, beginning, Options(MEASURED_TOKENS, None), Stats(), planner))
        if costs.next_to_measure(min(DRAFT_STEPS, manifest.max_draft_tokens)) is None:
            break
    return costs


def base_pair(pair: Pair, base_dir: Path) -> Pair:
    """Open the target that another was before it was trained further, with the same drafter and head.

    Args:
        pair: the target that was trained further, and its drafter.
        base_dir: checkpoint directory of the target before.

    Raises:
        InputError: it cannot be opened, or has other sizes; its vocabulary may be smaller.
    """
    base = open_pair(base_dir, pair.drafter_checkpoint.directory, "dense")
    grown = {key: getattr(pair.target, key) for key in ("vocab_size", "vocab_size_per_layer_input")}
    if replace(base.target, **grown) != pair.target or base.target.vocab_size > pair.target.vocab_size:
        raise InputError(
            f"--base {base_dir}: has other sizes than {pair.target_checkpoint.directory}; pass the checkpoint that this"
            " one was trained from"
        )
    if pair.table is None or pair.two_stage is None:
        return base
    return base.with_clusters(pair.table, pair.two_stage.top_k_clusters, pair.clusters_origin)


def new_tokens(study: Study) -> Experiment:
    """Judge how often a target with a grown vocabulary chooses tokens that its drafter does not have."""
    name, known = "tokens that the drafter lacks", study.pair.drafter.text.vocab_size
    added = study.pair.target.vocab_size - known
    if not added:
        return Experiment(name, SKIPPED, "none, both have the same vocabulary")
    tokens = torch.cat(study.answers) if study.answers else torch.empty(0, dtype=torch.int64)
    share = float((tokens >= known).double().mean()) if len(tokens) else 0.0
    detail = f"{added} at the end of the target's vocabulary: {share:.1%} of {len(tokens)} tokens that it chose here,"
    figures = {"added_tokens": float(added), "chosen": share}
    return Experiment(name, FINDING if share > MIN_GAIN else PASS, f"{detail} each of which ends a round", figures)


def against_base(study: Study, base: Study) -> Experiment:
    """Judge whether more drafts are accepted by the target that the drafter was trained for.

    Args:
        study: of the target that was trained further.
        base: of the target before that, on the same beginnings, in float32.
    """
    name = "the target before its training"
    tuned_rounds = study.rounds[CORRECT if study.in_fp32 else FP32_BOTH]
    rates = [_rates(rounds) for rounds in (tuned_rounds, base.rounds[CORRECT])]
    if any(len(part) < 2 for part in rates):
        return Experiment(name, SKIPPED, "too few texts are long enough, or begin without tokens that only one has")
    tuned, before = (float(part.mean()) for part in rates)
    standard_error = math.sqrt(sum(float(part.var()) / len(part) for part in rates))
    figures = {"acceptance": tuned, "acceptance_before": before, "standard_error": standard_error}
    detail = f"{tuned:.1%} of drafts accepted on its own texts, {before:.1%} by the target before, both in float32"
    gain, texts = before - tuned, min(map(len, rates))
    if texts < MIN_TEXTS or gain <= max(MIN_GAIN, MIN_STANDARD_ERRORS * standard_error):
        return Experiment(name, PASS, detail, figures)
    detail += ": its training led it away from the drafter; train that on texts of the target"
    return Experiment(name, FINDING, detail, figures | {"gain": gain})


def _rates(rounds: Sequence[Tensor]) -> Tensor:
    """Accepted drafts over proposed drafts of each text, [texts] float64."""
    return torch.tensor([float(text.double().mean()) / DRAFT_STEPS for text in rounds], dtype=torch.float64)
