"""What the report shows about a bundle, measured as one document."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clustering.recall import best_logits, cluster_ranks, recall_curve
from exporter.bench.bandwidth import usable_cpus
from exporter.bench.footprint import footprint
from exporter.bench.measure import measure_context, versions
from exporter.bench.speculation import ForcedEngine, gains
from exporter.bench.timing import machine
from exporter.checkpoint.names import DRAFTER_EMBEDDING
from exporter.checkpoint.pair import Pair
from exporter.heads.clusters import Clustering
from exporter.heads.states import drafting_states
from exporter.parity.stages import Check, run_parity
from exporter.report.texts import (
    OPENING_TOKENS,
    Text,
    acceptance,
    check_length,
    lengths,
    openings,
    speed,
    take_turns,
    tokens_per_round,
)
from runtime_ref.decoder import check_prompt
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import Manifest, read_manifest
from runtime_ref.tokenizer import TextTokenizer

Note = Callable[[str], None]


@dataclass(frozen=True)
class ReportOptions:
    """What the user chose; `seconds` is the budget of one kind of pass, three times that of one number of drafts."""

    threads: int | None = None
    max_new_tokens: int = 64
    seconds: float = 1.0


def measure_report(
    bundle: Path,
    pair: Pair | None,
    prompts: Sequence[Sequence[int]],
    options: ReportOptions = ReportOptions(),
    note: Note = lambda _: None,
) -> dict[str, Any]:
    """All that the page shows, as one document. A bundle that fails parity is measured as far as it runs.

    Args:
        pair: the checkpoints it was made from, for all rungs of parity and for the recall of its clusters.
        prompts: token ids to continue; empty for openings that the target makes up.
        note: told what is being done.

    Raises:
        InputError: not a bundle, checkpoints or prompts that do not fit it, or no room for a text.
    """
    manifest, threads = read_manifest(bundle), options.threads or usable_cpus()
    for prompt in prompts:
        check_prompt(manifest, prompt)
    # First, because checkpoints that do not fit are refused here, before minutes of measuring.
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
    """What drafting does to text, what passes cost, and what is resident; also the texts, with their prompts.

    Raises:
        InputError: the bundle cannot be loaded or run, or has no room for a text.
    """
    assert options.threads is not None
    default, most = manifest.default_draft_tokens, manifest.max_draft_tokens
    note("memory")
    load = footprint(bundle, options.threads)
    engine = load_engine(bundle, manifest, options.threads)
    source = "given" if prompts else f"openings of up to {OPENING_TOKENS} tokens, sampled at temperature 1"
    note("openings")
    prompts = prompts or openings(engine, options.max_new_tokens)
    note(f"{len(prompts)} texts of up to {options.max_new_tokens} tokens, plain and speculative in turns")
    choices = (0, *lengths(default, most), *([None] if most else []))
    runs = take_turns(engine, prompts, options.max_new_tokens, choices, 3 * options.seconds)
    shown = default or most
    check_length(runs[shown][0], shown)
    wholes = [[*prompt, *text.tokens] for prompt, text in zip(prompts, runs[0][0], strict=True)]
    costs = measure_costs(engine, max(wholes, key=len), options.seconds, note)
    found: dict[str, Any] = {
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
    if most:
        by_length = acceptance(runs[most][0])
        plain = found["speed"]["measured"][0]["tokens_per_second"]["median"]
        found["drafting"] = {
            "num_draft_tokens": shown,
            "acceptance": acceptance(runs[shown][0]),
            "longest": by_length,
            "rounds": tokens_per_round(runs[shown][0], shown),
            "sample": sample(bundle, manifest, prompts, runs[shown][0]),
        }
        found["speed"]["computed"] = [
            {"num_draft_tokens": k, "times_faster": gain, "tokens_per_second": gain * plain}
            for k, gain in enumerate(computed(by_length, costs, manifest.row_multiple), start=1)
        ]
    return found, wholes


def measure_costs(engine: GraphEngine, text: Sequence[int], seconds: float, note: Note) -> dict[str, Any]:
    """What passes and draft steps take in the middle of a text.

    Raises:
        InputError: the context ends before the longest pass does.
    """
    manifest = engine.manifest
    longest = max(8, manifest.max_draft_tokens + 1)
    context = min(len(text) * 3 // 4, manifest.max_seq_len - longest)
    if context < 1:
        raise InputError(
            f"the bundle's context of {manifest.max_seq_len} tokens has no room for a pass of {longest} after a text;"
            " export with a larger --max-seq-len"
        )
    # It has a cache of its own, so the engine it shares graphs with is done by now.
    forced = ForcedEngine(manifest, engine.graphs, engine.tables)
    return measure_context(forced, list(text[:context]), seconds, note)


def computed(longest: dict[str, Any], costs: dict[str, Any], row_multiple: int) -> list[float]:
    """Times faster than plain for 1, 2, .. drafts: what the longest rounds accepted, over what passes cost.

    A round of K drafts adds one token, and the i-th draft as often as one at position i was accepted.
    """
    shares = [row["accepted_share"] for row in longest["by_position"]]
    tokens = (1 + np.cumsum(shares)).tolist()
    return gains(
        {row["tokens"]: row["cost"] for row in costs["passes"]}, costs["draft_step"]["cost"], tokens, row_multiple
    )


def sample(bundle: Path, manifest: Manifest, prompts: Sequence[Sequence[int]], texts: Sequence[Text]) -> dict[str, Any]:
    """The longest text, token by token, in words if the bundle has a tokenizer and as ids if it has none."""
    number = max(range(len(texts)), key=lambda i: len(texts[i].tokens))
    prompt, text = list(prompts[number]), texts[number]
    if (bundle / "tokenizer.json").exists():
        tokenizer = TextTokenizer(bundle, manifest)
        stream, start = tokenizer.stream(), tokenizer.decode(prompt)
        pieces = [stream.add(token) for token in text.tokens]
        pieces[-1] += stream.flush()
    else:
        start, pieces = " ".join(map(str, prompt)), [f" {token}" for token in text.tokens]
    return {
        "prompt": start,
        "pieces": [{"text": piece, "drafted": one} for piece, one in zip(pieces, text.drafted, strict=True)],
        "tokens": len(text.tokens),
        "drafted": sum(text.drafted),
        "passes": 1 + len(text.rounds),
    }


def measure_recall(pair: Pair | None, texts: Sequence[Sequence[int]], note: Note) -> dict[str, Any] | None:
    """How many states keep their best token in the bundle's clusters, on drafting after every token of the texts.

    None without checkpoints, texts or clusters. Weights are the checkpoint's, not rounded as the recipe does.
    """
    if pair is None or pair.table is None or pair.two_stage is None or not texts:
        return None
    table = pair.table
    note("recall: drafting")
    states = drafting_states(pair.dense, texts, lambda: None).numpy()
    rows = pair.drafter_checkpoint.load(DRAFTER_EMBEDDING).numpy()
    note("recall: scores")
    best = best_logits(states, rows, table.members)
    curve = recall_curve(cluster_ranks(states, best, table.centroids), len(table.centroids))
    where = "drafting on the texts of this page"
    return Clustering(table, pair.two_stage.top_k_clusters, curve, len(states), where, None).facts()


def checks_of(facts: dict[str, Any]) -> list[Check]:
    """The checks of parity, as `run_parity` gave them."""
    return [Check.from_dict(check) for check in facts["parity"]["checks"]]
