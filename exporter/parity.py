"""Prove a bundle: files, weights, graphs against eager torch, then plain and speculative tokens, rung by rung."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clustering.table import load_table
from exporter.backends import load_backend
from exporter.bundle import CLUSTERS, describe
from exporter.graphs import size_limits
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target, empty_kv
from exporter.pair import Pair, open_pair
from runtime_ref.decoder import Options, check_prompt, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import MANIFEST, Manifest, changed_files, read_manifest
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

# Largest error allowed against the same model in float64, relative to the largest magnitude of that output (or 1).
TOLERANCES: Mapping[str, tuple[float, str]] = {
    "fp32": (1e-4, "same weights, same formulas: only the order of float32 sums differs"),
}

# A deep or badly conditioned model amplifies float32 rounding past any fixed bound, in eager torch as in a bundle. So a
# bundle may also be this many times as far from float64 as eager float32 is; on a random pair of E4B's depth it was
# 1.0 to 1.5 times as far.
EAGER_FACTOR = 4

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
    if manifest.recipe not in TOLERANCES:
        raise InputError(f"{bundle}: recipe {manifest.recipe!r} is unknown; expected one of {', '.join(TOLERANCES)}")
    prompts = prompts or default_prompts(manifest)
    for prompt in prompts:
        check_prompt(manifest, prompt)
    if pair is not None:
        _refuse_other_shapes(bundle, manifest, pair)
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
    wanted: list[list[int]] | None = None
    if pair is not None:
        yield from _check_source(manifest, pair)
        note("weights")
        yield from _check_weights(bundle, manifest, pair)
        note("eager")
        with torch.no_grad():
            target, drafter = pair.load_target(), pair.load_drafter()
            wanted = [_greedy(target, manifest, prompt, max_new_tokens) for prompt in prompts]
            yield from _check_graphs(engine, target, drafter, pair, prompts, wanted)
    dense = ""
    if pair is not None and pair.two_stage is not None:
        note("dense head")
        with_dense = GraphEngine(manifest, {**engine.graphs, "drafter": _EagerDrafter(pair.dense)})
        runs = [_tokens(with_dense, p, max_new_tokens, manifest.default_draft_tokens) for p in prompts]
        dense = f" ({sum(s.accepted for _, s in runs)} of {sum(s.drafted for _, s in runs)} with a dense head)"
        engine = GraphEngine(manifest, engine.graphs)  # the graphs go back to a cache of this one's own
    note("plain")
    plain = [_tokens(engine, prompt, max_new_tokens, 0)[0] for prompt in prompts]
    if wanted is not None:
        settled = [_settle_tie(target, manifest, *texts) for texts in zip(prompts, wanted, plain, strict=True)]
        yield _check_tokens("plain", "tokens = eager", plain, settled)
    note("speculative")
    for sampling, label in ((Sampling(), "greedy"), (Sampling(1.0, 0.95, seed=1), "sampled")):
        alone = plain if label == "greedy" else [_tokens(engine, p, max_new_tokens, 0, sampling)[0] for p in prompts]
        runs = [_tokens(engine, p, max_new_tokens, manifest.default_draft_tokens, sampling) for p in prompts]
        drafted, accepted = sum(s.drafted for _, s in runs), sum(s.accepted for _, s in runs)
        detail = f"accepted {accepted} of {drafted} drafts" + (dense if label == "greedy" else "")
        yield _check_tokens("speculative", f"{label} tokens = plain", [t for t, _ in runs], alone, detail)


class _EagerDrafter:
    """A drafter in eager torch, in the place of a bundle's drafter graph."""

    def __init__(self, pair: Pair) -> None:
        self.drafter, self.layers = pair.load_drafter(), pair.shared_kv
        self.kv: dict[str, tuple[Tensor, Tensor]] = {}

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        for kind, i in self.layers.items():
            self.kv[kind] = (torch.from_numpy(cache[f"key_{i}"]), torch.from_numpy(cache[f"value_{i}"]))

    @torch.no_grad()
    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        draft, state = self.drafter(*(torch.from_numpy(array) for array in inputs.values()), self.kv)
        return [draft.numpy(), state.numpy()]


def default_prompts(manifest: Manifest) -> list[list[int]]:
    """Seeded random prompts: one token, a few, and one that crosses the sliding window if the context allows."""
    generator = np.random.default_rng(0)
    crossing = min(manifest.raw["target"]["sliding_window"] + 9, manifest.max_seq_len // 2)
    return [generator.integers(0, manifest.vocab_size, size).tolist() for size in (1, 7, crossing)]


def _refuse_other_shapes(bundle: Path, manifest: Manifest, pair: Pair) -> None:
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
    expected["limits"] = size_limits(manifest.max_seq_len, manifest.max_draft_tokens)
    differing = [key for key, value in expected.items() if manifest.raw.get(key) != value]
    if manifest.max_seq_len > pair.target.max_position_embeddings:
        differing.append("max_seq_len")
    detail = f"differs: {', '.join(differing)}" if differing else "fits the checkpoints"
    yield Check("source", "manifest", not differing, detail=detail)


def _check_weights(bundle: Path, manifest: Manifest, pair: Pair) -> Iterator[Check]:
    """Every stored weight against the checkpoint's, bit by bit: nothing else sees a row no prompt touches."""
    weights = {"target": pair.target_weights, "drafter": pair.drafter_weights}
    graphs = {name: (bundle / manifest.graphs[name].file, readers) for name, readers in weights.items()}
    for graph, differing in load_backend(manifest.backend).differing_weights(graphs).items():
        listed = f"{len(differing)} differ: {', '.join(differing[:3])}"
        detail = listed if differing else f"{len(weights[graph])} tensors equal"
        yield Check("weights", f"{graph} weights", not differing, detail=detail)


def _check_graphs(
    engine: GraphEngine,
    target: Target,
    drafter: Drafter,
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> list[Check]:
    """Errors of each graph output over all prompts: a prefill, a verify pass, and a round of draft steps."""
    exact_target, exact_drafter = pair.load_target().double(), pair.load_drafter().double()
    errors: dict[str, list[tuple[float, float]]] = {}
    drafts_equal = True

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
            kv, exact_kv = eager.kv, exact.kv
            logits, ids, states = engine.run_target(tokens, rows)
            k, at = ids.shape[1], torch.from_numpy(ids)
            compare("top logits", logits, eager.logits.topk(k).values, exact.logits.topk(k).values)
            compare("logits at top ids", logits, eager.logits.gather(1, at), exact.logits.gather(1, at))
            compare("state", states, eager.state, exact.state)
            engine.position += len(tokens)
        for buffer, part, exact_part in zip(engine.manifest.kv, kv, exact_kv, strict=True):
            name = f"KV cache, {buffer.layer_type.removesuffix('_attention')} layers"
            compare(name, engine.cache[buffer.name][:, : engine.position], part, exact_part)
        shared = {kind: (kv[2 * i], kv[2 * i + 1]) for kind, i in pair.shared_kv.items()}
        exact_shared = {kind: (exact_kv[2 * i], exact_kv[2 * i + 1]) for kind, i in pair.shared_kv.items()}
        token, state = eager.logits[-1:].argmax(-1), eager.state[-1:]
        position = torch.tensor([engine.position])
        for _ in range(steps):  # each from the eager state, so that steps are judged one by one
            found_token, found_state = engine.draft_step(int(token), state.numpy())
            _, exact_state = exact_drafter(token, state.double(), position, exact_shared)
            token, state = drafter(token, state, position, shared)
            compare("draft state", found_state, state, exact_state)
            drafts_equal &= found_token == int(token)
    return [
        *(_check_error(engine.manifest, name, pairs) for name, pairs in errors.items()),
        Check(
            "graphs", "draft tokens", drafts_equal, detail="equal eager's" if drafts_equal else "differ from eager's"
        ),
    ]


def _check_error(manifest: Manifest, output: str, errors: Sequence[tuple[float, float]]) -> Check:
    """Judge the largest error of an output against the tolerance, or against what eager torch itself reaches."""
    found, eager = (float(np.max(column)) for column in zip(*errors, strict=True))  # unlike max, keeps NaN
    tolerance, _ = TOLERANCES[manifest.recipe]
    allowed = max(tolerance, EAGER_FACTOR * eager)
    if not np.isfinite([found, eager]).all():
        return Check("graphs", output, False, detail="not finite")
    return Check("graphs", output, found <= allowed, error=found, tolerance=allowed)


def _error(found: Tensor, exact: Tensor) -> float:
    scale = max(1.0, float(exact.abs().max()))
    return float((found.double() - exact).abs().max()) / scale


def _greedy(target: Target, manifest: Manifest, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens of the eager target, stopped where a runtime stops."""
    budget = min(max_new_tokens, manifest.max_seq_len - len(prompt))
    kv = empty_kv(target.config, len(prompt) + budget)
    tokens, new, position = list(prompt), [], 0
    while True:
        out = target(torch.tensor(tokens), torch.tensor([position]), torch.tensor([len(tokens) - 1]), kv)
        kv, position = out.kv, position + len(tokens)
        tokens = [int(out.logits[0].argmax())]
        new += tokens
        if len(new) == budget or tokens[0] in manifest.eos:
            return new


@torch.no_grad()
def _settle_tie(
    target: Target, manifest: Manifest, prompt: Sequence[int], eager: list[int], plain: list[int]
) -> list[int]:
    """Eager tokens, or plain ones where both first part at two logits closer than the tolerance: either is right."""
    at = first_difference(eager, plain)
    if at >= min(len(eager), len(plain)):
        return eager
    tokens = torch.tensor([*prompt, *eager[:at]])
    out = target(tokens, torch.tensor([0]), torch.tensor([len(tokens) - 1]), empty_kv(target.config, len(tokens)))
    margin = abs(float(out.logits[0, eager[at]] - out.logits[0, plain[at]]))
    tolerance, _ = TOLERANCES[manifest.recipe]
    return plain if margin <= tolerance * max(1.0, float(out.logits.abs().max())) else eager


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
