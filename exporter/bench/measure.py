"""Time and memory of a bundle on this machine, as `gemma-mtp-export bench` reports them.

Token ids are random and seeded. Times do not depend on the text, so bundles of random weights can be timed as well.
Each measurement has a budget of seconds: a large bundle takes minutes, a tiny one seconds.

Passes that are compared run in turns, and their costs are ratios of lower quartiles. On a machine that does other work
too, half of the short passes may be interrupted, which shows in their median, and nearly every long pass is, which
leaves its minimum to chance. The bandwidth ratio compares the fastest decode step with the fastest read.

A decode step reads every weight of the target once: its layers and the token embedding, which is also the head. The
cache is not counted, nor are tables of which only single rows are read. A draft step is timed as a whole, with its
head; the number of multiplications of the head is reported as a ratio to that of a dense head.
`exporter.studies.two_stage_speed` times heads by themselves.
"""

import functools
import itertools
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bench.bandwidth import read_bandwidth, usable_cpus
from exporter.bench.footprint import footprint
from exporter.bench.speculation import ForcedEngine, forced_generation, speedups
from exporter.bench.timing import in_turns, machine, spread
from runtime_ref.engine import load_engine
from runtime_ref.errors import CheckError, InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import MANIFEST, Manifest, read_manifest
from runtime_ref.sampling import Sampling

DEFAULT_CONTEXT_TOKENS = (512, 4096)
PASS_TOKENS = (1, 2, 3, 4, 5, 6, 8)  # lengths of the passes that are timed, besides that of the longest round
DEFAULT_ACCEPTANCES = (0.3, 0.5, 0.7, 0.9)
FORCED_ACCEPTANCE = 0.7
FORCED_DRAFT_TOKENS = 4
MIN_NEW_TOKENS, MAX_NEW_TOKENS = 32, 128  # generated to measure a rate

Note = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What the user chose.

    Attributes:
        threads: threads of the runtime; None for one for each CPU that the process may run on.
        contexts: numbers of tokens before those that are timed; empty for the default ones that fit.
        acceptance: probability that a draft is accepted if all drafts before it were; None for the defaults.
        seconds: time budget in seconds of each measurement.
    """

    threads: int | None = None
    contexts: Sequence[int] = ()
    acceptance: float | None = None
    seconds: float = 4.0


def measure_bundle(
    bundle: Path, options: BenchOptions, note: Note = lambda _: None, warn: Note = lambda _: None
) -> dict[str, Any]:
    """Measure everything that `bench` reports about a bundle.

    Args:
        bundle: a bundle's directory.
        options: what the user chose.
        note: called with the name of each measurement before it starts.
        warn: called with one line about contexts that are too long and left out.

    Returns:
        The document of `bench --json`.

    Raises:
        InputError: not a bundle, one that cannot be loaded, or none of the contexts fits.
    """
    manifest = replace(read_manifest(bundle), eos=frozenset())  # random text must not end early
    threads = options.threads or usable_cpus()
    contexts = fitting_contexts(bundle, manifest, options.contexts, warn)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before our own load
    note("bandwidth")
    bandwidth = read_bandwidth(threads, options.seconds / 2)
    note("loading")
    load = footprint(bundle, threads)
    loaded = load_engine(bundle, manifest, threads)
    engine = ForcedEngine(manifest, loaded.graphs, loaded.tables)
    engine.prefill(random_ids(manifest, min(manifest.limits["num_tokens"], contexts[0])), Sampling())  # warms up
    weights = decode_weights(manifest)
    measurements, computed = [], []
    for context in contexts:
        prompt = random_ids(manifest, context)
        measured = measure_context(engine, prompt, options.seconds, note)
        if weights["bytes"] is not None:
            min_seconds = weights["bytes"] / bandwidth["max"] / 1e9
            measured["decode"]["share_of_bandwidth"] = min_seconds / (measured["decode"]["ms"]["min"] / 1000)
        measurements.append(measured)
        computed += context_speedups(measured, options.acceptance, manifest)
        if context == contexts[0]:
            generation = generate_forced(engine, prompt, measured, options, note)
    return {
        "bundle": str(bundle),
        "machine": machine(),
        "threads": threads,
        "load_average": load_average,
        "backend": manifest.backend,
        "recipe": manifest.recipe,
        "versions": versions(manifest),
        "read_bandwidth_gb_s": bandwidth,
        "decode_weights": weights,
        "load": load,
        "contexts": measurements,
        "speedup": computed,
        "generation": generation,
    }


def check_same_text(document: dict[str, Any]) -> None:
    """Check that forced speculative decoding generated the tokens of plain decoding.

    Args:
        document: the result of `measure_bundle`.

    Raises:
        CheckError: the tokens differ.
    """
    if not document["generation"]["same_tokens"]:
        raise CheckError("bench: speculative tokens differ from plain ones; run `parity` on the bundle")


def fitting_contexts(bundle: Path, manifest: Manifest, requested: Sequence[int], warn: Note) -> list[int]:
    """Choose the contexts that leave room for a round and a short text after them.

    Of the default contexts, those that fit are chosen. If none does, the longest context that fits is chosen instead,
    so that small bundles can be timed as well.

    Args:
        bundle: the bundle's directory, for messages.
        manifest: the bundle's manifest.
        requested: contexts in tokens, in any order; empty for the default ones.
        warn: called with one line about contexts that do not fit.

    Returns:
        Numbers of tokens, in rising order; at least one.

    Raises:
        InputError: none of the requested contexts fits, or the bundle has no room for any.
    """
    longest = manifest.max_seq_len - MIN_NEW_TOKENS - manifest.max_draft_tokens - 1
    contexts = sorted(set(requested or DEFAULT_CONTEXT_TOKENS))
    fitting = [context for context in contexts if context <= longest]
    room = (
        f"{bundle} has {manifest.max_seq_len} positions, room for at most {max(longest, 0)} before those that are timed"
    )
    if not fitting and (requested or longest < 1):
        raise InputError(f"--context {contexts[0]} is too long: {room}; export with a larger --max-seq-len")
    if left_out := contexts[len(fitting) :]:
        instead = "" if fitting else f"; {longest} is timed instead"
        warn(f"left out: context {' and '.join(map(str, left_out))}, {room}{instead}")
    return fitting or [longest]


def random_ids(manifest: Manifest, count: int) -> list[int]:
    """Draw `count` token ids of the bundle's vocabulary; the same count always gives the same ids."""
    return np.random.default_rng(count).integers(0, manifest.vocab_size, count).tolist()


def decode_weights(manifest: Manifest) -> dict[str, Any]:
    """Return how many bytes of weights a decode step reads.

    Returns:
        `bytes`, None if the manifest does not allow to derive them, and `derived_from`, what they are derived from.
    """
    sizes = {name: size for name, (size, _) in manifest.files.items()}
    if weights := [name for name in sizes if re.fullmatch(r"target(\.\d+)?\.weights", name)]:
        return {"bytes": sum(sizes[name] for name in weights), "derived_from": f"size of {', '.join(weights)}"}
    file = manifest.graphs["target"].file
    try:
        drafter = manifest.raw["backend"]["delegation"]["drafter"]
        others = int(drafter["delegated_weight_bytes"]) + int(drafter["portable_weight_bytes"])
    except (KeyError, TypeError, ValueError):
        return {"bytes": None, "derived_from": f"nothing: {MANIFEST} does not list the bytes of the drafter's weights"}
    return {
        "bytes": sizes[file] - others,
        "derived_from": f"size of {file} less the drafter's weights, its 4-bit weights counted as 8 bits each",
    }


def measure_context(engine: ForcedEngine, prompt: list[int], seconds: float, note: Note) -> dict[str, Any]:
    """Time a prefill, passes of each length and draft steps after one prompt.

    Args:
        engine: an engine of the bundle.
        prompt: token ids.
        seconds: time budget in seconds of the prefills, of each length of passes, and of the draft steps.
        note: called with the name of each measurement before it starts.

    Returns:
        An entry of `contexts` in the document of `bench --json`, without `share_of_bandwidth`.
    """
    context = len(prompt)
    note(f"prefill of {context} tokens")

    def prefill() -> None:
        engine.forget()
        engine.prefill(prompt, Sampling())

    prefills = in_turns({"prefill": prefill}, seconds, min_turns=1, max_turns=3)["prefill"]
    note(f"passes after {context} tokens")
    calls, drafts = pass_calls(engine)
    calls[max(key for key in calls if isinstance(key, int))]()  # the cache grows, and sliding layers move, once
    times = in_turns(calls, seconds)
    steps, decode = spread([time / drafts for time in times.pop("drafts")]), spread(times[1])
    return {
        "context": context,
        "prefill": {"ms": spread(prefills), "tokens_per_second": 1000 * context / statistics.median(prefills)},
        "decode": {"ms": decode, "tokens_per_second": 1000 / decode["median"]},
        "passes": [
            {"tokens": tokens, "ms": spread(measured), "cost": spread(measured)["quartile"] / decode["quartile"]}
            for tokens, measured in times.items()
        ],
        "draft_step": {
            "ms": steps,
            "cost": steps["quartile"] / decode["quartile"],
            "steps_in_a_row": drafts,
            "two_stage_share_of_dense_head": two_stage_ratio(engine.manifest),
        },
    }


def two_stage_ratio(manifest: Manifest) -> float | None:
    """Return the multiplications of a two-stage head divided by those of a dense one; None for a dense head."""
    sizes = manifest.raw["two_stage"]
    if sizes is None:
        return None
    scored = sizes["num_clusters"] + sizes["top_k_clusters"] * sizes["cluster_size"]
    return scored / manifest.vocab_size


def pass_calls(engine: GraphEngine) -> tuple[dict[int | str, Callable[[], object]], int]:
    """Make the calls that are timed at the engine's position: passes of the target, and draft steps.

    No call moves the position, so each can be repeated. Each pass has other tokens, so it reads other embedding rows,
    as it would in a text. The draft steps of a round are timed together, because only the first of them finds that its
    weights are no longer in the processor's caches.

    Args:
        engine: an engine after a prefill, with room for the longest round after it.

    Returns:
        The passes by their number of tokens, and the draft steps of a round at the key "drafts"; and how many draft
        steps those are.
    """
    manifest = engine.manifest
    longest = min(manifest.max_draft_tokens + 1, manifest.limits["num_outputs"])
    text, drafts = itertools.cycle(random_ids(manifest, 4096)), max(1, manifest.default_draft_tokens)

    def run(tokens: int) -> None:
        engine.run_target(list(itertools.islice(text, tokens)), range(tokens))

    lengths = sorted({longest, *(t for t in PASS_TOKENS if t <= manifest.limits["num_outputs"])})
    calls: dict[int | str, Callable[[], object]] = {t: functools.partial(run, t) for t in lengths}
    # Not the engine's own method: that of an engine with forced drafts does more.
    calls["drafts"] = lambda: GraphEngine.draft(engine, next(text), drafts)
    return calls, drafts


def context_speedups(measured: dict[str, Any], acceptance: float | None, manifest: Manifest) -> list[dict[str, Any]]:
    """Compute how many times faster than plain decoding each number of drafts is at one context.

    Args:
        measured: the result of `measure_context`.
        acceptance: probability that a draft is accepted if all drafts before it were; None for the defaults.
        manifest: the bundle's manifest.

    Returns:
        Entries of `speedup` in the document of `bench --json`, one for each acceptance.
    """
    costs = {row["tokens"]: row["cost"] for row in measured["passes"]}
    rows, max_drafts = [], manifest.max_draft_tokens
    for chance in DEFAULT_ACCEPTANCES if acceptance is None else (acceptance,):
        by_drafts = speedups(costs, measured["draft_step"]["cost"], chance, max_drafts, manifest.row_multiple)
        fastest = max(by_drafts, default=0.0)
        best = {"best_num_draft_tokens": by_drafts.index(fastest) + 1, "best": fastest} if by_drafts else {}
        rows.append({"context": measured["context"], "acceptance": chance, "by_num_draft_tokens": by_drafts, **best})
    return rows


def generate_forced(
    engine: ForcedEngine, prompt: list[int], measured: dict[str, Any], options: BenchOptions, note: Note
) -> dict[str, Any]:
    """Time plain and forced speculative decoding after a prompt.

    Args:
        engine: an engine of the bundle.
        prompt: token ids.
        measured: the result of `measure_context` for this prompt.
        options: what the user chose.
        note: called with the name of the measurement before it starts.

    Returns:
        `generation` of the document of `bench --json`; `expected_times_faster` is computed from the costs in
        `measured`.
    """
    manifest = engine.manifest
    acceptance = FORCED_ACCEPTANCE if options.acceptance is None else options.acceptance
    (computed,) = context_speedups(measured, acceptance, manifest)
    drafts = {min(FORCED_DRAFT_TOKENS, manifest.max_draft_tokens), computed.get("best_num_draft_tokens", 0)} - {0}
    affordable = int(1000 * options.seconds / measured["decode"]["ms"]["median"])
    new_tokens = min(max(affordable, MIN_NEW_TOKENS), MAX_NEW_TOKENS, manifest.max_seq_len - len(prompt))
    note(f"{new_tokens} tokens after {len(prompt)}, plain and speculative in turns")
    generation = forced_generation(engine, prompt, new_tokens, acceptance, sorted(drafts), options.seconds)
    for row in generation["speculative"]:
        row["expected_times_faster"] = computed["by_num_draft_tokens"][row["num_draft_tokens"] - 1]
    return {"context": len(prompt), **generation}


def versions(manifest: Manifest) -> dict[str, str | None]:
    """Return the versions of the packages that ran the bundle, and of the one that exported it."""
    runtime = {"onnx": "onnxruntime"}.get(manifest.backend, manifest.backend)
    installed = {name: version(name) for name in ("gemma-mtp-export", "numpy", runtime)}
    return {"python": platform.python_version(), **installed, "exported_by": manifest.raw.get("tool_version")}
