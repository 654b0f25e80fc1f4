"""Compare a bundle with its checkpoints in stages: files, weights, graphs, plain tokens, speculative tokens."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporter.bundle.export import describe, source_of
from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.files import directory_bytes
from exporter.graphs.backend import load_backend
from exporter.graphs.parts import all_widths, graph_parts
from exporter.graphs.spec import DrafterGraph, size_limits
from exporter.graphs.tables import differing_rows, outside_tables
from exporter.modeling.drafter import kv_by_type
from exporter.modeling.target import empty_kv, is_suppressed
from exporter.parity.checks import Check
from exporter.parity.gate import Figures, Gate, gate_checks
from exporter.parity.grids_kept import grids_check
from exporter.parity.quality import logits_after, measure_quality, quality_checks
from exporter.parity.reference import EagerGraph, Reference
from exporter.parity.source import calibration_check, refuse_other_sizes
from exporter.parity.tolerance import relative_error, tolerance_for
from exporter.quantization.recipes import recipe_of
from exporter.quantization.widths import by_width
from exporter.texts.documents import HELD_OUT
from exporter.texts.token_texts import TokenTexts, has_tokenizer, token_texts
from runtime_ref.acceptance import common_prefix
from runtime_ref.decoder import Options, check_prompts, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine, chunks
from runtime_ref.manifest import Manifest, changed_files, read_manifest
from runtime_ref.requirements import required_features
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

COMPARABLE_FEATURES = {"split-tables", "channels"}  # others change what graphs take
LOGITS = "logits at top ids"  # the output whose tolerance also bounds ties between tokens

Note = Callable[[str], None]


def run_parity(
    bundle: Path, pair: Pair | None, prompts: Sequence[Sequence[int]], max_new_tokens: int, note: Note = lambda _: None
) -> list[Check]:
    """Run every stage whose inputs are given, and collect all failures.

    Args:
        bundle: a directory that `export` wrote.
        pair: the checkpoints it was made from; without them only the files and the speculative tokens are checked.
        prompts: token ids; seeded random ones if empty.
        max_new_tokens: length limit of each answer, in tokens.
        note: called with the name of each stage that begins.

    Returns:
        The checks in the order of their stages. A bundle that does not load or run is a failed check.

    Raises:
        InputError: not a bundle, an unknown recipe, a prompt that cannot be run, or checkpoints of other sizes.
    """
    return measure_parity(bundle, pair, prompts, max_new_tokens, Gate(), note)[0]


def measure_parity(
    bundle: Path,
    pair: Pair | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    gate: Gate,
    note: Note = lambda _: None,
) -> tuple[list[Check], Figures]:
    """Do what `run_parity` does, and hold the bundle to limits of quality and size.

    Args:
        bundle: as for `run_parity`, like the other arguments.
        pair: with limits that need checkpoints, it must be given.
        prompts: token ids.
        max_new_tokens: length limit of each answer, in tokens.
        gate: the limits, each of which is a check.
        note: called with the name of each stage that begins.

    Returns:
        The checks, and the bundle's figures: `bundle_bytes`; `acceptance_rate` of its drafts; and if it was compared
        with its checkpoints, for other recipes than `fp32` or with such limits, `acceptance_rate_fp32`, `choices_kept`,
        `kl`, `sqnr_db`, `positions`, and both perplexities. Without prompts they are compared on held-out texts of this
        package, if the checkpoint has a tokenizer.

    Raises:
        InputError: as `run_parity`.
    """
    manifest = read_comparable(bundle, pair, prompts)
    measured_on, held_out = f"{len(prompts)} prompts" if prompts else "random prompts", None
    if pair is not None and not prompts and has_tokenizer(pair):
        held_out = token_texts(pair, name=HELD_OUT, max_text_tokens=manifest.max_seq_len)
    prompts = prompts or default_prompts(manifest)
    figures: dict[str, float | None] = {"bundle_bytes": directory_bytes(bundle)}
    note("files")
    changed = changed_files(bundle, manifest)
    listed = f"changed: {', '.join(changed)}" if changed else f"{len(manifest.files)} files match the manifest"
    checks = [Check("files", "sha256", not changed, detail=listed)]
    try:
        # The other stages run a changed bundle as well: they show what the change does.
        checks += _check_stages(bundle, manifest, pair, prompts, max_new_tokens, held_out, gate, figures, note)
    except InputError as error:
        checks.append(Check("bundle", "loads and runs", False, detail=str(error)))
    measured_on += f" and answers of {max_new_tokens} tokens"
    compared_on = measured_on if held_out is None else f"{held_out.num_tokens} tokens of {held_out.source}"
    return [*checks, *gate_checks(gate, figures, measured_on, compared_on)], figures


def _check_stages(
    bundle: Path,
    manifest: Manifest,
    pair: Pair | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    held_out: TokenTexts | None,
    gate: Gate,
    figures: dict[str, float | None],
    note: Note,
) -> Iterator[Check]:
    """Yield the checks of every stage after the files, and add to the figures."""
    engine = load_engine(bundle, manifest, threads=1)
    if pair is not None:
        yield from _check_source(manifest, pair)
        note("weights")
        yield from _check_weights(bundle, manifest, pair)
    note("plain")
    plain = [_tokens(engine, prompt, max_new_tokens, 0)[0] for prompt in prompts]
    dense_detail, quality = "", None
    if pair is not None:
        note("eager")
        reference = Reference(pair, recipe_of(manifest), manifest.backend)
        with torch.no_grad():
            yield _check_tables(engine, reference)
            checks, tolerance = _check_graphs(engine, reference, prompts, plain)
            yield from checks
            yield _check_choices(reference, prompts, plain, tolerance)
        if pair.two_stage is not None:
            note("dense head")
            dense_detail = _dense_acceptance(engine, reference, prompts, max_new_tokens)
            # The engine with a dense head bound the target to its own cache; a new engine binds it to a new one.
            engine = GraphEngine(manifest, engine.graphs, engine.tables)
        if not reference.recipe.is_exact or gate.needs_checkpoints:
            note("quality")
            quality = measure_quality(engine, pair, prompts, max_new_tokens, held_out)
    note("speculative")
    for sampling, label in ((Sampling(), "greedy"), (Sampling(1.0, 0.95, seed=1), "sampled")):
        expected = plain if label == "greedy" else [_tokens(engine, p, max_new_tokens, 0, sampling)[0] for p in prompts]
        runs = [_tokens(engine, p, max_new_tokens, manifest.default_draft_tokens, sampling) for p in prompts]
        drafted, accepted = sum(s.drafted for _, s in runs), sum(s.accepted for _, s in runs)
        detail = f"accepted {accepted} of {drafted} drafts" + (dense_detail if label == "greedy" else "")
        yield _check_tokens("speculative", f"{label} tokens = plain", [t for t, _ in runs], expected, detail)
        if label == "greedy":
            acceptance = figures["acceptance_rate"] = accepted / drafted if drafted else None
    if quality is not None:
        figures |= quality.figures
        yield from quality_checks(quality, acceptance)


def _dense_acceptance(
    engine: GraphEngine, reference: Reference, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> str:
    """Return how many drafts a dense head in the place of the bundle's gets accepted, as text for a detail."""
    manifest, pair = engine.manifest, reference.pair.dense
    drafter = Reference(pair, reference.recipe, manifest.backend).drafter()
    graph = EagerGraph(DrafterGraph(drafter, pair.shared_kv), manifest.graphs["drafter"])
    with_dense = GraphEngine(manifest, {**engine.graphs, "drafter": graph}, engine.tables)
    runs = [_tokens(with_dense, p, max_new_tokens, manifest.default_draft_tokens) for p in prompts]
    return f" ({sum(s.accepted for _, s in runs)} of {sum(s.drafted for _, s in runs)} with a dense head)"


def default_prompts(manifest: Manifest) -> list[list[int]]:
    """Return three seeded random prompts: of 1 token, of 7, and past the sliding window if the context allows."""
    generator = np.random.default_rng(0)
    past_window, max_size = manifest.raw["target"]["sliding_window"] + 9, max(1, manifest.max_seq_len // 2)
    return [generator.integers(0, manifest.vocab_size, min(size, max_size)).tolist() for size in (1, 7, past_window)]


def read_comparable(bundle: Path, pair: Pair | None, prompts: Sequence[Sequence[int]]) -> Manifest:
    """Read the manifest of a bundle, and check that it can be compared with the pair on these prompts.

    Args:
        bundle: a directory that `export` wrote.
        pair: the checkpoints that the user names as its source; None if there are none.
        prompts: token ids.

    Raises:
        InputError: not a bundle, an unknown recipe, a prompt that cannot be run, checkpoints of other sizes, or a
            feature that checkpoints cannot be compared with.
    """
    manifest = read_manifest(bundle)
    recipe_of(manifest)
    check_prompts(manifest, prompts)
    if pair is not None:
        refuse_other_sizes(bundle, manifest, pair)
        comparable = COMPARABLE_FEATURES | (set() if pair.head == EMBEDDING else {"untied-head"})
        if others := {feature["name"] for feature in manifest.raw["requires"]} - comparable:
            raise InputError(
                f"{bundle}: has the feature {min(others)}, with which it cannot be compared with checkpoints; leave out"
                " --target and --drafter"
            )
    return manifest


def _check_source(manifest: Manifest, pair: Pair) -> Iterator[Check]:
    """Check that these checkpoints were exported, and that the manifest describes them correctly."""
    found, exported = source_of(pair), manifest.raw["source"]
    for model, checkpoint in (("target", pair.target_checkpoint), ("drafter", pair.drafter_checkpoint)):
        same = found[model]["files"] == exported[model]["files"]
        detail = "the one that was exported" if same else f"{checkpoint.directory} is not the one that was exported"
        yield Check("source", f"{model} checkpoint", same, detail=detail)
    own, others = ([entry["files"] for entry in source["target"].get("adapters", ())] for source in (found, exported))
    if own or others:
        detail = f"{len(own)} given, {len(others)} exported" + ("" if own == others else ", not the same in this order")
        yield Check("source", "adapters", own == others, detail=detail)
    expected = json.loads(json.dumps(describe(pair, manifest.backend)))
    expected["limits"] = size_limits(manifest.max_seq_len, manifest.max_draft_tokens, pair.target.sliding_window)
    expected |= load_backend(manifest.backend).row_multiples()
    if "widths" in manifest.raw:
        recipe = recipe_of(manifest)
        expected["widths"] = by_width(all_widths(pair, recipe))
    expected["requires"] = required_features({**manifest.raw, **expected})
    differing = [key for key, value in expected.items() if manifest.raw.get(key) != value]
    if manifest.max_seq_len > pair.target.max_position_embeddings:
        differing.append("max_seq_len")
    detail = f"differs: {', '.join(differing)}" if differing else "fits the checkpoints"
    yield Check("source", "manifest", not differing, detail=detail)


def _check_weights(bundle: Path, manifest: Manifest, pair: Pair) -> Iterator[Check]:
    """Compare every stored weight with the checkpoint's, bit by bit: prompts reach only some rows of an embedding."""
    recipe = recipe_of(manifest)
    parts, files = graph_parts(pair, recipe), {name: bundle / graph.file for name, graph in manifest.graphs.items()}
    differing_by_graph = load_backend(manifest.backend).differing_weights(parts, files)
    counts = {name: len(part.weights) for name, part in parts.items()}
    for table in outside_tables(pair, recipe).values():
        title = "per-layer" if table.name == PER_LAYER else "embedding"
        differing_by_graph[title], counts[title] = differing_rows(bundle / table.file, table), 1
    for graph, differing in differing_by_graph.items():
        listed = f"{len(differing)} differ: {', '.join(differing[:3])}"
        detail = listed if differing else f"{counts[graph]} tensor{'s' * (counts[graph] > 1)} equal"
        yield Check("weights", f"{graph} weights", not differing, detail=detail)
    if (kept := grids_check(pair, recipe, load_backend(manifest.backend).supported_scales())) is not None:
        yield kept
    if pair.calibrated is not None:
        yield calibration_check(pair)


def _check_tables(engine: GraphEngine, reference: Reference) -> Check:
    """Compare embedding rows as the runtime reads them with the reference's, for 64 ids spread over the vocabulary."""
    ids = np.linspace(0, engine.manifest.vocab_size - 1, 64).astype(np.int64).tolist()
    expected = reference.engine(engine.manifest).tables
    wrong = [name for name, rows in engine.tables.items() if not np.array_equal(rows[ids], expected[name][ids])]
    detail = f"differ: {', '.join(wrong)}" if wrong else f"{len(ids)} of each table equal"
    return Check("weights", "embedding rows", not wrong, detail=detail)


def _check_graphs(
    engine: GraphEngine,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> tuple[list[Check], float]:
    """Compare each graph output over all prompts: in a prefill, a verify pass, and a round of draft steps.

    Returns:
        The checks, and the tolerance of the check `LOGITS`.
    """
    pair = reference.pair
    target, drafter = reference.target(int8_activations=True), reference.drafter(int8_activations=True)
    exact_target, exact_drafter = reference.target(torch.float64), reference.drafter(torch.float64)
    errors: dict[str, list[tuple[float, float]]] = {}
    differing, drafted, first_row = 0, 0, torch.zeros(1, dtype=torch.int64)

    def compare(name: str, actual: np.ndarray, eager: Tensor, exact: Tensor) -> None:
        pair_of_errors = relative_error(torch.from_numpy(actual), exact), relative_error(eager, exact)
        errors.setdefault(name, []).append(pair_of_errors)

    for prompt, continuation in zip(prompts, continuations, strict=True):
        steps = max(1, engine.manifest.default_draft_tokens)
        verify = continuation[: steps + 1]
        kv = empty_kv(pair.target, len(prompt) + len(verify))
        exact_kv = [part.double() for part in kv]
        engine.cache.roll_back(0)
        # Prefill returns the last row alone, verify every row: together they cover both uses of the graph.
        prefill = [chunk for _, chunk in chunks(prompt, engine.manifest.limits["num_tokens"])]
        for tokens, rows in [(part, [len(part) - 1]) for part in prefill] + [(verify, list(range(len(verify))))]:
            inputs = torch.tensor(tokens), torch.tensor([engine.position]), torch.tensor(rows)
            eager, exact = target(*inputs, kv), exact_target(*inputs, exact_kv)
            logits, ids, states = engine.extend(tokens, rows)
            k, top_ids = ids.shape[1], torch.from_numpy(ids)
            compare("top logits", logits, eager.logits.topk(k).values, exact.logits.topk(k).values)
            compare(LOGITS, logits, eager.logits.gather(1, top_ids), exact.logits.gather(1, top_ids))
            compare("state", states, eager.state, exact.state)
        for buffer, part, exact_part in zip(engine.manifest.kv, kv, exact_kv, strict=True):
            name = f"KV cache, {buffer.layer_type.removesuffix('_attention')} layers"
            start = engine.cache.window_start if buffer.layer_type == "sliding_attention" else 0
            actual = engine.cache.buffers[buffer.name][:, : engine.position - start]
            compare(name, actual, part[:, start:], exact_part[:, start:])
        shared, exact_shared = kv_by_type(kv, pair.shared_kv), kv_by_type(exact_kv, pair.shared_kv)
        token, state = eager.logits[-1:].argmax(-1), eager.state[-1:]
        position = torch.tensor([engine.position])
        for _ in range(steps):  # each from the eager state, so that steps are judged one by one
            actual_token, actual_state = engine.draft_step(int(token), state.numpy())
            embedded = exact_drafter.target_embed_tokens(token)
            _, exact_state = exact_drafter.step(embedded, state.double(), position, first_row, exact_shared)
            token, state = drafter(token, state, position, shared)
            compare("draft state", actual_state, state, exact_state)
            differing, drafted = differing + (actual_token != int(token)), drafted + 1
    checks = [_check_error(name, pairs) for name, pairs in errors.items()]
    # Where activations are rounded some drafts may differ.
    max_differing = 0 if reference.recipe.is_exact else drafted // 2
    detail = f"{differing} of {drafted} differ from eager's" if differing else "equal eager's"
    checks.append(Check("graphs", "draft tokens", differing <= max_differing, detail=detail))
    return checks, next(check.tolerance or 0.0 for check in checks if check.output == LOGITS)


def _check_error(output: str, errors: Sequence[tuple[float, float]]) -> Check:
    """Judge an output by its largest error; `errors` are pairs, the bundle's and eager torch's."""
    actual, eager = (float(np.max(column)) for column in zip(*errors, strict=True))  # unlike max, keeps NaN
    tolerance = tolerance_for(eager)
    if not np.isfinite([actual, eager]).all():
        return Check("graphs", output, False, detail="not finite")
    return Check("graphs", output, actual <= tolerance, error=actual, tolerance=tolerance)


def _check_choices(
    reference: Reference, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], tolerance: float
) -> Check:
    """Check that eager torch, given the text so far, chooses each token of an answer, or ties with it."""
    target, equal, total, largest_tie = reference.target(int8_activations=True), 0, 0, 0.0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = logits_after(target, [*prompt, *answer[:-1]], len(answer))
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        largest = logits.masked_fill(is_suppressed(logits), 0).abs().amax()
        behind = (logits.amax(1) - chosen) / largest.clamp(min=1)
        if (worst := float(behind.max())) > tolerance or not np.isfinite(worst):
            index = int(behind.argmax())
            return Check("plain", "tokens = eager", False, detail=f"prompt {number} differs at new token {index}")
        equal, total, largest_tie = equal + int((behind == 0).sum()), total + len(answer), max(largest_tie, worst)
    ties = f", {total - equal} ties of {largest_tie:.0e} or less (allowed {tolerance:.0e})" if equal < total else ""
    return Check("plain", "tokens = eager", True, detail=f"{equal} of {total} tokens equal{ties}")


def _tokens(
    engine: GraphEngine, prompt: Sequence[int], max_new_tokens: int, drafts: int, sampling: Sampling = Sampling()
) -> tuple[list[int], Stats]:
    stats = Stats()
    return list(generate(engine, prompt, Options(max_new_tokens, drafts, sampling), stats)), stats


def _check_tokens(
    stage: str, output: str, actual: list[list[int]], expected: list[list[int]], detail: str = ""
) -> Check:
    """Compare answers token by token; the detail names the first difference."""
    for number, (answer, expected_answer) in enumerate(zip(actual, expected, strict=True)):
        if answer != expected_answer:
            index = common_prefix(answer, expected_answer)
            return Check(stage, output, False, detail=f"prompt {number} differs from new token {index} on")
    total = sum(map(len, expected))
    return Check(stage, output, True, detail=f"{total} tokens equal" + (f", {detail}" if detail else ""))
