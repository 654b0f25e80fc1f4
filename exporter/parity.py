"""Prove a bundle: files, weights, graphs against eager torch, then plain and speculative tokens, rung by rung."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clustering.cluster_table import load_table
from exporter.backends import load_backend
from exporter.bundle import CLUSTERS, describe
from exporter.graphs import DrafterGraph, size_limits
from exporter.modeling.target import empty_kv
from exporter.pair import Pair, open_pair
from exporter.parts import graph_parts
from exporter.quality import Quality, logits_after, measure_quality
from exporter.recipes import RECIPES
from exporter.reference import EagerGraph, Reference
from exporter.tables import PER_LAYER_FILE, differing_rows
from runtime_ref.decoder import Options, check_prompt, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import MANIFEST, Manifest, changed_files, read_manifest
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

# Largest error allowed against the recipe's weights in float64, relative to the largest magnitude of that output (or
# 1): same weights, same formulas, only the order of float32 sums differs.
TOLERANCE = 1e-4

# A deep or badly conditioned model amplifies rounding past any fixed bound, in eager torch as in a bundle: that of
# float32 sums, and that of activations to 8 bits, which layers of few bits take. So a bundle may also be this many
# times as far from float64 as eager torch with the same rounding is; on a random pair of E4B's depth it was 1.0 to 1.5.
EAGER_FACTOR = 4

# But not further than this: of an output of zeros the error would be 1, and a model that rounding disturbs so much
# cannot be judged.
CEILING = 0.5

Note = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One row of the parity table. `error` and `tolerance` are None where the check is exact."""

    rung: str
    output: str
    passed: bool
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


def open_source(bundle: Path, target_dir: Path, drafter_dir: Path) -> Pair:
    """The checkpoints that a bundle was made from, with the head that it was made with.

    Raises:
        InputError: bundle or checkpoints cannot be read.
    """
    two_stage = read_manifest(bundle).raw["two_stage"]
    if two_stage is None:
        return open_pair(target_dir, drafter_dir, "dense")
    try:
        origin, top_k = two_stage["origin"], int(two_stage["top_k_clusters"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{bundle / MANIFEST}: two_stage is malformed ({reason}); export again") from error
    if origin == "checkpoint":
        return open_pair(target_dir, drafter_dir, "checkpoint", top_k)
    pair = open_pair(target_dir, drafter_dir, "dense")
    text = pair.drafter.text
    table, _ = load_table(bundle / CLUSTERS, text.vocab_size, text.hidden_size)
    return pair.with_clusters(table, top_k, origin)


def run_parity(
    bundle: Path, pair: Pair | None, prompts: Sequence[Sequence[int]], max_new_tokens: int, note: Note = lambda _: None
) -> list[Check]:
    """Climb every rung there is input for; all failures are collected.

    Args:
        pair: the checkpoints the bundle was made from; without them only integrity and losslessness can be checked.
        prompts: token ids; empty for seeded random ones.
        note: told what is being checked.
    """
    manifest = read_manifest(bundle)
    if manifest.recipe not in RECIPES:
        raise InputError(f"{bundle}: recipe {manifest.recipe!r} is unknown; expected one of {', '.join(RECIPES)}")
    prompts = prompts or default_prompts(manifest)
    for prompt in prompts:
        check_prompt(manifest, prompt)
    if pair is not None:
        refuse_other_shapes(bundle, manifest, pair)
    note("files")
    changed = changed_files(bundle, manifest)
    listed = f"changed: {', '.join(changed)}" if changed else f"{len(manifest.files)} files match the manifest"
    checks = [Check("files", "sha256", not changed, detail=listed)]
    try:
        # The rungs below run a changed bundle as well: they show what the change does.
        checks += _climb(bundle, manifest, pair, prompts, max_new_tokens, note)
    except InputError as error:
        checks.append(Check("bundle", "loads and runs", False, detail=str(error)))
    return checks


def _climb(
    bundle: Path,
    manifest: Manifest,
    pair: Pair | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    note: Note,
) -> Iterator[Check]:
    """Checks of each rung above the files, as they are done."""
    engine = load_engine(bundle, manifest, threads=1)
    if pair is not None:
        yield from _check_source(manifest, pair)
        note("weights")
        yield from _check_weights(bundle, manifest, pair)
    note("plain")
    plain = [_tokens(engine, prompt, max_new_tokens, 0)[0] for prompt in prompts]
    dense, quality = "", None
    if pair is not None:
        note("eager")
        reference = Reference(pair, RECIPES[manifest.recipe], load_backend(manifest.backend).scales())
        with torch.no_grad():
            yield _check_tables(engine, reference)
            checks, allowed = _check_graphs(engine, reference, prompts, plain)
            yield from checks
            yield _check_choices(reference, prompts, plain, allowed)
        if pair.two_stage is not None:
            note("dense head")
            dense = _dense_acceptance(engine, reference, prompts, max_new_tokens)
        if manifest.recipe != "fp32":
            note("quality")
            quality = measure_quality(engine, pair, prompts, max_new_tokens)
        engine = GraphEngine(manifest, engine.graphs, engine.tables)  # the graphs go back to a cache of this one's own
    note("speculative")
    for sampling, label in ((Sampling(), "greedy"), (Sampling(1.0, 0.95, seed=1), "sampled")):
        alone = plain if label == "greedy" else [_tokens(engine, p, max_new_tokens, 0, sampling)[0] for p in prompts]
        runs = [_tokens(engine, p, max_new_tokens, manifest.default_draft_tokens, sampling) for p in prompts]
        drafted, accepted = sum(s.drafted for _, s in runs), sum(s.accepted for _, s in runs)
        detail = f"accepted {accepted} of {drafted} drafts" + (dense if label == "greedy" else "")
        yield _check_tokens("speculative", f"{label} tokens = plain", [t for t, _ in runs], alone, detail)
        if label == "greedy":
            acceptance = accepted / max(drafted, 1)
    if quality is not None:
        yield from _show_quality(quality, acceptance)


def _dense_acceptance(
    engine: GraphEngine, reference: Reference, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> str:
    """What a dense head would have accepted."""
    manifest, pair = engine.manifest, reference.pair.dense
    drafter = Reference(pair, reference.recipe, reference.scales).drafter()
    graph = EagerGraph(DrafterGraph(drafter, pair.shared_kv), manifest.graphs["drafter"])
    with_dense = GraphEngine(manifest, {**engine.graphs, "drafter": graph}, engine.tables)
    runs = [_tokens(with_dense, p, max_new_tokens, manifest.default_draft_tokens) for p in prompts]
    return f" ({sum(s.accepted for _, s in runs)} of {sum(s.drafted for _, s in runs)} with a dense head)"


def _show_quality(quality: Quality, acceptance: float) -> Iterator[Check]:
    """What the recipe costs against the checkpoints: facts, which only a bundle that is no number fails."""
    found = (
        ("logits", f"SQNR {quality.sqnr:.1f} dB"),
        ("choices", f"{quality.agreement:.1%} of {quality.positions} top-1 equal"),
        ("drafts", f"{acceptance:.1%} accepted, {quality.acceptance:.1%} in fp32"),
    )
    for output, detail in found:
        yield Check("recipe", f"{output} against fp32", not np.isnan(quality.sqnr), detail=detail)


def default_prompts(manifest: Manifest) -> list[list[int]]:
    """Seeded random prompts: one token, a few, and one that crosses the sliding window if the context allows."""
    generator = np.random.default_rng(0)
    crossing, most = manifest.raw["target"]["sliding_window"] + 9, max(1, manifest.max_seq_len // 2)
    return [generator.integers(0, manifest.vocab_size, min(size, most)).tolist() for size in (1, 7, crossing)]


def refuse_other_shapes(bundle: Path, manifest: Manifest, pair: Pair) -> None:
    """Refuse checkpoints that cannot be the ones the bundle was exported from: nothing could be compared."""
    for kind, config in (("target", pair.target), ("drafter", pair.drafter)):
        ours = json.loads(json.dumps(asdict(config)))
        theirs = manifest.raw[kind]
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"{bundle}: was exported from another {kind}: {key} is {theirs.get(key)}, the checkpoint has"
                    f" {ours.get(key)}; pass the checkpoints it was made from"
                )


def _check_source(manifest: Manifest, pair: Pair) -> Iterator[Check]:
    """Whether these are the checkpoints that were exported, and the manifest says of them what it should."""
    for kind, checkpoint in (("target", pair.target_checkpoint), ("drafter", pair.drafter_checkpoint)):
        same = checkpoint.sha256() == manifest.raw["source"][kind]
        detail = "the one that was exported" if same else f"{checkpoint.directory} is not the one that was exported"
        yield Check("source", f"{kind} checkpoint", same, detail=detail)
    expected = json.loads(json.dumps(describe(pair, manifest.backend)))
    expected["limits"] = size_limits(manifest.max_seq_len, manifest.max_draft_tokens, pair.target.sliding_window)
    expected |= load_backend(manifest.backend).row_multiples()
    differing = [key for key, value in expected.items() if manifest.raw.get(key) != value]
    if manifest.max_seq_len > pair.target.max_position_embeddings:
        differing.append("max_seq_len")
    detail = f"differs: {', '.join(differing)}" if differing else "fits the checkpoints"
    yield Check("source", "manifest", not differing, detail=detail)


def _check_weights(bundle: Path, manifest: Manifest, pair: Pair) -> Iterator[Check]:
    """Every stored weight against the checkpoint's, bit by bit: nothing else sees a row no prompt touches."""
    recipe = RECIPES[manifest.recipe]
    parts, files = graph_parts(pair, recipe), {name: bundle / graph.file for name, graph in manifest.graphs.items()}
    found = load_backend(manifest.backend).differing_weights(parts, files)
    counts = {name: len(part.weights) for name, part in parts.items()}
    found["per-layer"], counts["per-layer"] = differing_rows(bundle / PER_LAYER_FILE, pair, recipe.per_layer), 1
    for graph, differing in found.items():
        listed = f"{len(differing)} differ: {', '.join(differing[:3])}"
        detail = listed if differing else f"{counts[graph]} tensor{'s' * (counts[graph] > 1)} equal"
        yield Check("weights", f"{graph} weights", not differing, detail=detail)


def _check_tables(engine: GraphEngine, reference: Reference) -> Check:
    """Whether look-ups give what the recipe makes of the checkpoint's rows."""
    ids = np.linspace(0, engine.manifest.vocab_size - 1, 64).astype(np.int64).tolist()
    wanted = reference.engine(engine.manifest).tables
    wrong = [name for name, rows in engine.tables.items() if not np.array_equal(rows[ids], wanted[name][ids])]
    return Check("weights", "look-ups", not wrong, detail=f"differ: {', '.join(wrong)}" if wrong else "rows equal")


def _check_graphs(
    engine: GraphEngine,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> tuple[list[Check], float]:
    """Errors of each graph output over all prompts: a prefill, a verify pass, and a round of draft steps.

    Also returns what is allowed of logits.
    """
    pair = reference.pair
    target, drafter = reference.target(rounded=True), reference.drafter(rounded=True)
    exact_target, exact_drafter = reference.target(torch.float64), reference.drafter(torch.float64)
    errors: dict[str, list[tuple[float, float]]] = {}
    differing, drafted, first_row = 0, 0, torch.zeros(1, dtype=torch.int64)

    def compare(name: str, found: np.ndarray, eager: Tensor, exact: Tensor) -> None:
        errors.setdefault(name, []).append((_error(torch.from_numpy(found), exact), _error(eager, exact)))

    for prompt, continuation in zip(prompts, continuations, strict=True):
        steps = max(1, engine.manifest.default_draft_tokens)
        verify = continuation[: steps + 1]
        kv = empty_kv(pair.target, len(prompt) + len(verify))
        exact_kv = [part.double() for part in kv]
        engine.position = 0
        # Prefill asks for the last row alone, verify for every row: together they cover both uses of the graph.
        chunk = engine.manifest.limits["num_tokens"]
        prefill = [prompt[start : start + chunk] for start in range(0, len(prompt), chunk)]
        for tokens, rows in [(part, [len(part) - 1]) for part in prefill] + [(verify, list(range(len(verify))))]:
            inputs = torch.tensor(tokens), torch.tensor([engine.position]), torch.tensor(rows)
            eager, exact = target(*inputs, kv), exact_target(*inputs, exact_kv)
            logits, ids, states = engine.run_target(tokens, rows)
            k, at = ids.shape[1], torch.from_numpy(ids)
            compare("top logits", logits, eager.logits.topk(k).values, exact.logits.topk(k).values)
            compare(LOGITS, logits, eager.logits.gather(1, at), exact.logits.gather(1, at))
            compare("state", states, eager.state, exact.state)
            engine.position += len(tokens)
        for buffer, part, exact_part in zip(engine.manifest.kv, kv, exact_kv, strict=True):
            name = f"KV cache, {buffer.layer_type.removesuffix('_attention')} layers"
            start = engine.window_start if buffer.layer_type == "sliding_attention" else 0
            found = engine.cache[buffer.name][:, : engine.position - start]
            compare(name, found, part[:, start:], exact_part[:, start:])
        shared = {kind: (kv[2 * i], kv[2 * i + 1]) for kind, i in pair.shared_kv.items()}
        exact_shared = {kind: (exact_kv[2 * i], exact_kv[2 * i + 1]) for kind, i in pair.shared_kv.items()}
        token, state = eager.logits[-1:].argmax(-1), eager.state[-1:]
        position = torch.tensor([engine.position])
        for _ in range(steps):  # each from the eager state, so that steps are judged one by one
            found_token, found_state = engine.draft_step(int(token), state.numpy())
            embedded = exact_drafter.target_embed_tokens(token)
            _, exact_state = exact_drafter.step(embedded, state.double(), position, first_row, exact_shared)
            token, state = drafter(token, state, position, shared)
            compare("draft state", found_state, state, exact_state)
            differing, drafted = differing + (found_token != int(token)), drafted + 1
    checks = [_check_error(name, pairs) for name, pairs in errors.items()]
    # With rounded activations a draft may be another token now and then.
    few = 0 if reference.recipe == RECIPES["fp32"] else drafted // 2
    detail = f"{differing} of {drafted} differ from eager's" if differing else "equal eager's"
    checks.append(Check("graphs", "draft tokens", differing <= few, detail=detail))
    return checks, next(check.tolerance or 0.0 for check in checks if check.output == LOGITS)


LOGITS = "logits at top ids"


def _check_error(output: str, errors: Sequence[tuple[float, float]]) -> Check:
    """Judge the largest error of an output against the tolerance, or against what eager torch itself reaches."""
    found, eager = (float(np.max(column)) for column in zip(*errors, strict=True))  # unlike max, keeps NaN
    allowed = min(max(TOLERANCE, EAGER_FACTOR * eager), CEILING)
    if not np.isfinite([found, eager]).all():
        return Check("graphs", output, False, detail="not finite")
    return Check("graphs", output, found <= allowed, error=found, tolerance=allowed)


def _error(found: Tensor, exact: Tensor) -> float:
    scale = max(1.0, float(exact.abs().max()))
    return float((found.double() - exact).abs().max()) / scale


def _check_choices(
    reference: Reference, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], allowed: float
) -> Check:
    """Whether eager torch, given the text so far, would have chosen each token, but for ties as close as is allowed."""
    target, equal, total, tie = reference.target(rounded=True), 0, 0, 0.0
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        logits = logits_after(target, [*prompt, *text[:-1]], len(text))
        chosen = logits.gather(1, torch.tensor(text).unsqueeze(1)).squeeze(1)
        behind = (logits.amax(1) - chosen) / logits.abs().amax().clamp(min=1)
        if (worst := float(behind.max())) > allowed or not np.isfinite(worst):
            at = int(behind.argmax())
            return Check("plain", "tokens = eager", False, detail=f"prompt {number} differs at new token {at}")
        equal, total, tie = equal + int((behind == 0).sum()), total + len(text), max(tie, worst)
    ties = f", {total - equal} ties of {tie:.0e} or less (allowed {allowed:.0e})" if equal < total else ""
    return Check("plain", "tokens = eager", True, detail=f"{equal} of {total} tokens equal{ties}")


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index at which two token lists part; the shorter's length if one continues the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tokens(
    engine: GraphEngine, prompt: Sequence[int], max_new_tokens: int, drafts: int, sampling: Sampling = Sampling()
) -> tuple[list[int], Stats]:
    stats = Stats()
    return list(generate(engine, prompt, Options(max_new_tokens, drafts, sampling), stats)), stats


def _check_tokens(rung: str, output: str, found: list[list[int]], wanted: list[list[int]], detail: str = "") -> Check:
    """Token for token; a difference is reported at its first place."""
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours != theirs:
            at = first_difference(ours, theirs)
            return Check(rung, output, False, detail=f"prompt {number} differs from new token {at} on")
    total = sum(map(len, wanted))
    return Check(rung, output, True, detail=f"{total} tokens equal" + (f", {detail}" if detail else ""))
