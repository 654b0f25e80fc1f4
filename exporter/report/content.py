"""Everything that the report page shows about a bundle, measured and gathered in one document."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clustering.recall import best_logits, cluster_ranks, recall_curve
from exporter.bench.bandwidth import usable_cpus
from exporter.bench.footprint import footprint
from exporter.bench.measure import PASS_TOKENS, measure_context, versions
from exporter.bench.speculation import ForcedEngine, speedups_from_tokens
from exporter.bench.timing import machine
from exporter.checkpoint.names import drafter_embedding
from exporter.checkpoint.pair import Pair
from exporter.heads.clusters import Clustering
from exporter.heads.states import drafting_states
from exporter.parity.checks import Check
from exporter.parity.stages import Note, run_parity
from exporter.report.texts import (
    MAX_OPENING_TOKENS,
    Text,
    acceptance,
    check_rounds,
    draft_lengths,
    openings,
    speed,
    take_turns,
    tokens_per_round,
)
from runtime_ref.decoder import check_prompts
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import Manifest, read_manifest
from runtime_ref.tokenizer import TextTokenizer


@dataclass(frozen=True)
class ReportOptions:
    """What the user chose.

    Attributes:
        threads: threads of the runtime; None for one for each CPU that the process may run on.
        max_new_tokens: tokens after which a continuation ends.
        seconds: time budget in seconds of each length of passes; each number of drafts per round has three times that.
    """

    threads: int | None
    max_new_tokens: int
    seconds: float = 1.0


def measure_report(
    bundle: Path,
    pair: Pair | None,
    prompts: Sequence[Sequence[int]],
    options: ReportOptions,
    note: Note = lambda _: None,
) -> dict[str, Any]:
    """Measure everything that the page shows. A bundle that fails parity is measured as far as it runs.

    Args:
        bundle: a bundle's directory.
        pair: the checkpoints it was made from, for all stages of parity and the recall of its clusters; or None.
        prompts: token ids to continue, a list for each text; empty for openings that the target generates.
        options: what the user chose.
        note: called with the name of each step before it starts.

    Returns:
        The document of `report --json`.

    Raises:
        InputError: not a bundle, checkpoints or prompts that do not fit it, or no room for a text.
    """
    manifest, threads = read_manifest(bundle), options.threads or usable_cpus()
    check_prompts(manifest, prompts)
    # Parity comes first: it refuses checkpoints that do not fit, before minutes of measuring.
    checks = run_parity(bundle, pair, prompts, options.max_new_tokens, lambda stage: note(f"parity: {stage}"))
    failed = [check for check in checks if not check.passed]
    measured, reason = None, ""
    try:
        measured, texts = measure_texts(bundle, manifest, prompts, replace(options, threads=threads), note)
    except InputError as error:
        if not failed:
            raise
        reason, texts = str(error), []
    return {
        "name": bundle.resolve().name,
        "bundle": str(bundle),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "backend": manifest.backend,
        "recipe": manifest.recipe,
        "machine": machine(),
        "threads": threads,
        "versions": versions(manifest),
        "max_seq_len": manifest.max_seq_len,
        "num_draft_tokens": {"default": manifest.default_draft_tokens, "max": manifest.max_draft_tokens},
        "measured": measured,
        "not_measured": reason,
        "two_stage": manifest.raw["two_stage"],
        "recall": measure_recall(pair, texts, note),
        "files": {name: size for name, (size, _) in manifest.files.items()},
        "total_bytes": sum(size for size, _ in manifest.files.values()),
        "parity": {
            "passed": not failed,
            "with_checkpoints": pair is not None,
            "checks": [check.as_dict() for check in checks],
        },
    }


def measure_texts(
    bundle: Path, manifest: Manifest, prompts: Sequence[Sequence[int]], options: ReportOptions, note: Note
) -> tuple[dict[str, Any], list[list[int]]]:
    """Measure drafting on texts, the costs of passes, and memory.

    Args:
        bundle: a bundle's directory.
        manifest: the bundle's manifest.
        prompts: token ids to continue, a list for each text; empty for openings that the target generates.
        options: what the user chose; `threads` must not be None.
        note: called with the name of each step before it starts.

    Returns:
        `measured` of the document, and the token ids of each text with its prompt.

    Raises:
        InputError: the bundle cannot be loaded or run, or has no room for a text.
    """
    assert options.threads is not None
    default, max_drafts = manifest.default_draft_tokens, manifest.max_draft_tokens
    note("memory")
    load = footprint(bundle, options.threads)
    engine = load_engine(bundle, manifest, options.threads)
    source = "given" if prompts else f"openings of up to {MAX_OPENING_TOKENS} tokens, sampled at temperature 1"
    note("openings")
    prompts = prompts or openings(engine, options.max_new_tokens)
    note(f"{len(prompts)} texts of up to {options.max_new_tokens} tokens, plain and speculative in turns")
    drafts = (0, *draft_lengths(default, max_drafts), *([None] if max_drafts else []))
    runs = take_turns(engine, prompts, options.max_new_tokens, drafts, 3 * options.seconds)
    shown = default or max_drafts
    check_rounds(runs[shown][0], shown)
    with_prompts = [[*prompt, *text.tokens] for prompt, text in zip(prompts, runs[0][0], strict=True)]
    costs = measure_costs(engine, max(with_prompts, key=len), options.seconds, note)
    measured: dict[str, Any] = {
        "texts": {
            "count": len(prompts),
            "prompts": source,
            "prompt_tokens": sum(map(len, prompts)),
            "new_tokens": sum(len(text.tokens) for text in runs[0][0]),
        },
        "speed": speed(runs),
        "costs": costs,
        "load": load,
        "drafting": None,
    }
    if max_drafts:
        longest = acceptance(runs[max_drafts][0])
        plain_rate = measured["speed"]["measured"][0]["tokens_per_second"]["median"]
        measured["drafting"] = {
            "num_draft_tokens": shown,
            "acceptance": acceptance(runs[shown][0]),
            "longest": longest,
            "rounds": tokens_per_round(runs[shown][0], shown),
            "sample": longest_text(bundle, manifest, prompts, runs[shown][0]),
        }
        measured["speed"]["computed"] = [
            {"num_draft_tokens": k, "times_faster": speedup, "tokens_per_second": speedup * plain_rate}
            for k, speedup in enumerate(computed_speedups(longest, costs, manifest.row_multiple), start=1)
        ]
    return measured, with_prompts


def measure_costs(engine: GraphEngine, text: Sequence[int], seconds: float, note: Note) -> dict[str, Any]:
    """Time passes and draft steps in the middle of a text.

    Args:
        engine: an engine of the bundle; its cache is lost, because it shares its graphs with a new engine.
        text: token ids, of which at most the first three quarters are the context.
        seconds: time budget in seconds of each length of passes.
        note: called with the name of each measurement before it starts.

    Returns:
        The result of `exporter.bench.measure.measure_context`.

    Raises:
        InputError: the context ends before the longest pass does.
    """
    manifest = engine.manifest
    longest = max(*PASS_TOKENS, manifest.max_draft_tokens + 1)  # of the passes that `measure_context` times
    context = min(len(text) * 3 // 4, manifest.max_seq_len - longest)
    if context < 1:
        raise InputError(
            f"the bundle has {manifest.max_seq_len} positions, expected a token of text and room for a pass of"
            f" {longest} after it; export with a larger --max-seq-len"
        )
    # The graphs are bound to the new engine's cache from here on.
    forced = ForcedEngine(manifest, engine.graphs, engine.tables)
    return measure_context(forced, list(text[:context]), seconds, note)


def computed_speedups(longest: dict[str, Any], costs: dict[str, Any], row_multiple: int) -> list[float]:
    """Compute how many times faster than plain decoding rounds of 1, 2, ... drafts are.

    A round of K drafts is taken to add one token, and its draft at position i as often as the longest rounds accepted
    drafts at that position.

    Args:
        longest: the result of `acceptance` for the longest rounds.
        costs: the result of `measure_costs`.
        row_multiple: passes are padded to a multiple of this many tokens.
    """
    rates = [row["accepted_share"] for row in longest["by_position"]]
    tokens = (1 + np.cumsum(rates)).tolist()
    by_length = {row["tokens"]: row["cost"] for row in costs["passes"]}
    return speedups_from_tokens(by_length, costs["draft_step"]["cost"], tokens, row_multiple)


def longest_text(
    bundle: Path, manifest: Manifest, prompts: Sequence[Sequence[int]], texts: Sequence[Text]
) -> dict[str, Any]:
    """Describe the longest text token by token, as text if the bundle has a tokenizer and as token ids if not.

    Args:
        bundle: a bundle's directory.
        manifest: the bundle's manifest.
        prompts: token ids of the prompt of each text.
        texts: the texts, at least one.

    Returns:
        `sample` of the document.
    """
    number = max(range(len(texts)), key=lambda i: len(texts[i].tokens))
    prompt, text = list(prompts[number]), texts[number]
    if (bundle / "tokenizer.json").exists():
        tokenizer = TextTokenizer(bundle, manifest)
        stream, start = tokenizer.stream(), tokenizer.decode(prompt)
        pieces = [stream.add(token).part_text for token in text.tokens]
        pieces[-1] += stream.flush()
    else:
        start, pieces = " ".join(map(str, prompt)), [f" {token}" for token in text.tokens]
    return {
        "prompt": start,
        "pieces": [{"text": piece, "drafted": drafted} for piece, drafted in zip(pieces, text.drafted, strict=True)],
        "tokens": len(text.tokens),
        "drafted": sum(text.drafted),
        "passes": 1 + len(text.rounds),
    }


def measure_recall(pair: Pair | None, texts: Sequence[Sequence[int]], note: Note) -> dict[str, Any] | None:
    """Measure how many of the drafter's states have their best token in the clusters that a draft step keeps.

    The states are those of drafting after every token of the texts. Weights are the checkpoint's, before the recipe
    quantizes them.

    Args:
        pair: the checkpoints that the bundle was made from, or None.
        texts: token ids of each text with its prompt.
        note: called with the name of each step before it starts.

    Returns:
        `recall` of the document; None without checkpoints, clusters or texts.
    """
    if pair is None or pair.table is None or pair.two_stage is None or not texts:
        return None
    table = pair.table
    note("recall: drafting")
    states = drafting_states(pair.dense, texts, lambda: None).numpy()
    rows = pair.drafter_checkpoint.load(drafter_embedding(pair.drafter_checkpoint)).numpy()
    note("recall: scores")
    best = best_logits(states, rows, table.members)
    curve = recall_curve(cluster_ranks(states, best, table.centroids), len(table.centroids))
    source = "drafting on the texts of this page"
    return Clustering(table, pair.two_stage.top_k_clusters, curve, len(states), source, None).measurements()


def checks_of(document: dict[str, Any]) -> list[Check]:
    """Return the checks of parity, as `run_parity` returned them to `measure_report`."""
    return [Check.from_dict(check) for check in document["parity"]["checks"]]
