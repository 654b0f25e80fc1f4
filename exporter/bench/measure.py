"""What a bundle takes on this machine: `gemma-mtp-export bench`.

Ids are random and seeded, so a bundle of random weights is as good as any: nothing here depends on what it says. Each
item has a budget of seconds, so that a large bundle takes minutes and a tiny one seconds. Passes that are compared take
turns, and costs are ratios of lower quartiles: where others share the machine, half of the short passes may be
interrupted, which is in their median, and hardly any long one is not, so that its minimum is luck. The share of the
bandwidth is that of the fastest step in the fastest read.

A decode step reads every weight of the target once: its layers and the token embedding, which is the head. Tables that
only serve look-ups are not read, and the cache is not counted. A draft step is timed as a whole, with its head; of that
the share of a dense head's multiplications is told. `exporter.bench.heads` times heads by themselves.
"""

import functools
import itertools
import os
import platform
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

CONTEXTS = (512, 4096)
PASSES = (1, 2, 3, 4, 5, 6, 8)  # tokens of the passes that are timed, and the longest round
ACCEPTANCES = (0.3, 0.5, 0.7, 0.9)
FORCED = 0.7
FORCED_DRAFTS = 4
NEW_TOKENS = (32, 128)  # least and most that are generated to measure a rate

Note = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What the user chose; `seconds` is the budget of one item."""

    threads: int | None = None
    contexts: Sequence[int] = ()
    acceptance: float | None = None
    seconds: float = 4.0


def measure_bundle(
    bundle: Path, options: BenchOptions, note: Note = lambda _: None, warn: Note = lambda _: None
) -> dict[str, Any]:
    """Everything about one bundle, as one document.

    Args:
        note: told what is being timed.
        warn: told of contexts that are left out.

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
    measured, gains = [], []
    for context in contexts:
        prompt = random_ids(manifest, context)
        found = measure_context(engine, prompt, options.seconds, note)
        if weights["bytes"] is not None:
            least = weights["bytes"] / bandwidth["max"] / 1e9
            found["decode"]["share_of_bandwidth"] = least / (found["decode"]["ms"]["min"] / 1000)
        measured.append(found)
        gains += context_gains(found, options.acceptance, manifest)
        if context == contexts[0]:
            generation = generate_forced(engine, prompt, found, options, note)
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
        "contexts": measured,
        "speedup": gains,
        "generation": generation,
    }


def check_same_text(facts: dict[str, Any]) -> None:
    """Raise CheckError where forced speculative decoding said something else than plain decoding."""
    if not facts["generation"]["same_tokens"]:
        raise CheckError("bench: speculative tokens differ from plain ones; run `parity` on the bundle")


def fitting_contexts(bundle: Path, manifest: Manifest, asked: Sequence[int], warn: Note) -> list[int]:
    """The contexts, in rising order, that leave room for a round and a short text after them.

    Of the default ones those that fit, or, so that small bundles can be timed as well, the longest that does.

    Raises:
        InputError: none of those asked for fits, or none at all.
    """
    longest = manifest.max_seq_len - NEW_TOKENS[0] - manifest.max_draft_tokens - 1
    wanted = sorted(set(asked or CONTEXTS))
    fitting = [context for context in wanted if context <= longest]
    room = f"{bundle} has {manifest.max_seq_len} positions, room for at most {longest} before what is timed"
    if not fitting and (asked or longest < 1):
        raise InputError(f"--context {wanted[0]} is too long: {room}; export with a larger --max-seq-len")
    if left_out := wanted[len(fitting) :]:
        instead = "" if fitting else f"; {longest} is timed instead"
        warn(f"left out: context {' and '.join(map(str, left_out))}, {room}{instead}")
    return fitting or [longest]


def random_ids(manifest: Manifest, count: int) -> list[int]:
    """Seeded token ids."""
    return np.random.default_rng(count).integers(0, manifest.vocab_size, count).tolist()


def decode_weights(manifest: Manifest) -> dict[str, Any]:
    """Bytes of weights that one decode step reads, and what they are derived from; None where it cannot be told."""
    sizes = {name: size for name, (size, _) in manifest.files.items()}
    if "target.weights" in sizes:
        return {"bytes": sizes["target.weights"], "derived_from": "size of target.weights"}
    file = manifest.graphs["target"].file
    try:
        drafter = manifest.raw["backend"]["delegation"]["drafter"]
        others = int(drafter["delegated_weight_bytes"]) + int(drafter["portable_weight_bytes"])
    except (KeyError, TypeError, ValueError):
        return {"bytes": None, "derived_from": f"nothing: {MANIFEST} does not say what the drafter's weights take"}
    return {
        "bytes": sizes[file] - others,
        "derived_from": f"size of {file} less the drafter's weights, those of 4 bits counted as 8",
    }


def measure_context(engine: ForcedEngine, prompt: list[int], seconds: float, note: Note) -> dict[str, Any]:
    """Prefill, passes of each length and draft steps at one context."""
    context = len(prompt)
    note(f"prefill of {context} tokens")

    def prefill() -> None:
        engine.forget()
        engine.prefill(prompt, Sampling())

    prefills = in_turns({"prefill": prefill}, seconds, least=1, most=3)["prefill"]
    note(f"passes after {context} tokens")
    calls, drafts = passes(engine)
    calls[max(key for key in calls if isinstance(key, int))]()  # the cache grows, and sliding layers move, once
    times = in_turns(calls, seconds)
    steps, decode = spread([time / drafts for time in times.pop("drafts")]), spread(times[1])
    return {
        "context": context,
        "prefill": {"ms": spread(prefills), "tokens_per_second": 1000 * context / statistics.median(prefills)},
        "decode": {"ms": decode, "tokens_per_second": 1000 / decode["median"]},
        "passes": [
            {"tokens": tokens, "ms": spread(found), "cost": spread(found)["quartile"] / decode["quartile"]}
            for tokens, found in times.items()
        ],
        "draft_step": {
            "ms": steps,
            "cost": steps["quartile"] / decode["quartile"],
            "steps_in_a_row": drafts,
            "two_stage_share_of_dense_head": two_stage_share(engine.manifest),
        },
    }


def two_stage_share(manifest: Manifest) -> float | None:
    """Multiplications of a two-stage head as a share of a dense one's; None for a dense one."""
    sizes = manifest.raw["two_stage"]
    if sizes is None:
        return None
    scored = sizes["num_clusters"] + sizes["top_k_clusters"] * sizes["cluster_size"]
    return scored / manifest.vocab_size


def passes(engine: GraphEngine) -> tuple[dict[int | str, Callable[[], object]], int]:
    """Calls that pass so many tokens through the target at the engine's position, and one that drafts as often as said.

    The position stays, so nothing adds up. Tokens are others in each pass, so look-ups are those of a text; a round's
    drafts are timed together, because only the first finds its weights out of the processor's caches.
    """
    manifest = engine.manifest
    longest = min(manifest.max_draft_tokens + 1, manifest.limits["num_outputs"])
    text, drafts = itertools.cycle(random_ids(manifest, 4096)), max(1, manifest.default_draft_tokens)

    def run(tokens: int) -> None:
        engine.run_target(list(itertools.islice(text, tokens)), range(tokens))

    lengths = sorted({longest, *(t for t in PASSES if t <= manifest.limits["num_outputs"])})
    calls: dict[int | str, Callable[[], object]] = {t: functools.partial(run, t) for t in lengths}
    # Not the engine's own method: that of an engine with forced drafts does more.
    calls["drafts"] = lambda: GraphEngine.draft(engine, next(text), drafts)
    return calls, drafts


def context_gains(found: dict[str, Any], acceptance: float | None, manifest: Manifest) -> list[dict[str, Any]]:
    """How many times faster than plain decoding each number of drafts is at one context, by acceptance."""
    costs = {row["tokens"]: row["cost"] for row in found["passes"]}
    gains, most = [], manifest.max_draft_tokens
    for chance in ACCEPTANCES if acceptance is None else (acceptance,):
        by_drafts = speedups(costs, found["draft_step"]["cost"], chance, most, manifest.row_multiple)
        best = {"best_num_draft_tokens": by_drafts.index(max(by_drafts)) + 1, "best": max(by_drafts)} if most else {}
        gains.append({"context": found["context"], "acceptance": chance, "by_num_draft_tokens": by_drafts, **best})
    return gains


def generate_forced(
    engine: ForcedEngine, prompt: list[int], found: dict[str, Any], options: BenchOptions, note: Note
) -> dict[str, Any]:
    """Plain and forced speculative decoding after the prompt, beside what the costs at that context say."""
    manifest = engine.manifest
    acceptance = FORCED if options.acceptance is None else options.acceptance
    (gain,) = context_gains(found, acceptance, manifest)
    drafts = {min(FORCED_DRAFTS, manifest.max_draft_tokens), gain.get("best_num_draft_tokens", 0)} - {0}
    fit = int(1000 * options.seconds / found["decode"]["ms"]["median"])
    new_tokens = min(max(fit, NEW_TOKENS[0]), NEW_TOKENS[1], manifest.max_seq_len - len(prompt))
    note(f"{new_tokens} tokens after {len(prompt)}, plain and speculative in turns")
    generation = forced_generation(engine, prompt, new_tokens, acceptance, sorted(drafts), options.seconds)
    for row in generation["speculative"]:
        row["expected_times_faster"] = gain["by_num_draft_tokens"][row["num_draft_tokens"] - 1]
    return {"context": len(prompt), **generation}


def versions(manifest: Manifest) -> dict[str, str | None]:
    """Of what ran, and of what exported the bundle."""
    runtime = {"onnx": "onnxruntime"}.get(manifest.backend, manifest.backend)
    ours = {name: version(name) for name in ("gemma-mtp-export", "numpy", runtime)}
    return {"python": platform.python_version(), **ours, "exported_by": manifest.raw.get("tool_version")}
