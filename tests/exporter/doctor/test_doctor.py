"""Every fault that the doctor knows, planted in graphs, a runtime or checkpoints; and none where there is none."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.checkpoint.pair import Pair, open_pair
from exporter.doctor import diagnosis
from exporter.doctor.diagnosis import Diagnosis, diagnose
from exporter.doctor.template import check_template
from exporter.doctor.verdicts import Experiment
from exporter.graphs import onnx
from exporter.graphs.parts import graph_parts
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops, additive_mask
from exporter.modeling.two_stage import TwoStageHead
from exporter.modeling.weights import load_module
from exporter.parity.reference import EagerGraph, Reference
from exporter.parity.stages import open_source
from exporter.quantization.numbers import Width
from exporter.quantization.recipes import RECIPES, Recipe
from runtime_ref.acceptance import Round
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import BoundGraph, GraphEngine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling
from tests.conftest import Directories, Run
from tests.pairs import SHAPES

NEW_TOKENS = 12
STATE, ROWS, WINDOW = "state after the final norm", "KV rows", "sliding window"
SOFTCAP, HEAD, KV = "softcap in the drafter", "clusters of the head", "precision of the KV cache"

Bundle = Callable[..., Path]
Pairs = Callable[[str], Directories]


def causes(
    engine: GraphEngine, pair: Pair, prompts: Sequence[Sequence[int]] = (), new_tokens: int = NEW_TOKENS
) -> dict[str, str]:
    """The details of what is found, by experiment, the most likely first."""
    return {e.experiment: e.detail for e in diagnose(engine, pair, prompts, new_tokens).findings}


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for values, which faults of a bundle show in; acceptance is not judged."""
    monkeypatch.setattr(diagnosis, "OPENINGS", 1)


def opened(path: Path, kind: type[GraphEngine] = GraphEngine, **graphs: BoundGraph) -> GraphEngine:
    """A bundle's engine, of another class or with other graphs."""
    engine = load_engine(path, read_manifest(path), threads=1)
    return kind(engine.manifest, {**engine.graphs, **graphs}, engine.tables)


@pytest.mark.parametrize(("name", "recipe"), [("demo", "fp32"), ("odd", "fp32"), ("e2b", "int4")])
def test_nothing_is_found_where_nothing_is_wrong(
    name: str, recipe: str, bundle: Bundle, pair_dirs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "OPENINGS", 5)  # enough to judge acceptance by
    path = bundle(name, "onnx", recipe)
    found = diagnose(opened(path), open_source(path, *pair_dirs(name)), max_new_tokens=NEW_TOKENS)
    assert found.findings == []
    verdicts = {e.experiment: e.verdict for e in found.experiments}
    exercised = {STATE, "embedding scale", "position", ROWS, KV}
    assert {verdicts[e] for e in exercised} == {"pass"}
    assert recipe != "fp32" or verdicts[WINDOW] == "pass"


@pytest.mark.usefixtures("few_texts")
def test_nothing_is_found_with_a_dense_head(bundle: Bundle, pair_dirs: Pairs) -> None:
    """In eager torch: a bundle of its own would be traced for nothing else."""
    path, pair = bundle("e2b", "onnx", "int4"), open_pair(*pair_dirs("e2b")).dense
    drafter = Reference(pair, RECIPES["int4"]).engine(read_manifest(path)).graphs["drafter"]
    found = diagnose(opened(path, drafter=drafter), pair, max_new_tokens=NEW_TOKENS)
    assert found.findings == []
    assert {e.experiment: e.detail for e in found.experiments}[HEAD].startswith("none, the head is dense")


@pytest.mark.parametrize(("max_seq_len", "max_draft_tokens", "verdict"), [(6, 8, "skipped"), (16, 1, "pass")])
def test_a_small_context(max_seq_len: int, max_draft_tokens: int, verdict: str, bundle: Bundle, odd: Pair) -> None:
    """Half of it is left to draft in; prompts that fill it are refused in one line."""
    engine = opened(bundle("odd"))
    engine.manifest = replace(engine.manifest, max_seq_len=max_seq_len, max_draft_tokens=max_draft_tokens)
    found = diagnose(engine, odd)
    assert found.findings == []
    assert {e.experiment: e.verdict for e in found.experiments}[HEAD] == verdict
    needed = min(4, max_draft_tokens) + 1
    with pytest.raises(InputError, match=f"no text had {needed} tokens after its prompt; pass shorter"):
        diagnose(engine, odd, [[5] * (max_seq_len - 1)])


# In the graphs


class Planted(Drafter):
    """A drafter that does one thing wrong, in code of its own."""

    moved, view, near, longer = 0, 0, 1, 0

    def step(
        self, embedded: Tensor, states: Tensor, positions: Tensor, window_start: Tensor, kv: Any
    ) -> tuple[Tensor, Tensor]:
        return super().step(embedded, states, positions + self.moved, window_start, kv)

    def _mask(self, layer_type: str, positions: Tensor, window_start: Tensor, rows: int) -> Tensor:
        text, sliding = self.config.text, layer_type == "sliding_attention"
        behind = positions.unsqueeze(1) - self.moved + self.view - torch.arange(rows) - (window_start if sliding else 0)
        visible = behind >= self.near
        if sliding:
            visible &= behind <= text.sliding_window + 1 + self.longer
        return additive_mask(visible, text.num_attention_heads // text.attention(layer_type).num_key_value_heads)


class Unscaled(Planted):
    def step(self, embedded: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return super().step(embedded / self.target_embed_tokens.scale, *rest)


class Below(Planted):
    moved = -1


class Above(Planted):
    moved = 1


class BelowWithRows(Planted):
    moved, view = -1, -1


class AboveWithRows(Planted):
    moved, view = 1, 1


class NewestMissing(Planted):
    near = 2


class RejectedInView(Planted):
    near = 0


class ShiftedDown(Planted):
    def step(self, embedded: Tensor, states: Tensor, positions: Tensor, start: Tensor, kv: Any) -> Any:
        kv = {kind: tuple(torch.cat((p[:, :1], p[:, :-1]), 1) for p in parts) for kind, parts in kv.items()}
        return super().step(embedded, states, positions, start, kv)


class ShiftedUp(Planted):
    def step(self, embedded: Tensor, states: Tensor, positions: Tensor, start: Tensor, kv: Any) -> Any:
        kv = {kind: tuple(torch.cat((p[:, 1:], p[:, -1:]), 1) for p in parts) for kind, parts in kv.items()}
        return super().step(embedded, states, positions, start, kv)


class Shorter(Planted):
    longer = -1


class Longer(Planted):
    longer = 1


class CappedHead(TwoStageHead):
    def _logits(self, hidden: Tensor, kept: Tensor) -> Tensor:
        return torch.tanh(super()._logits(hidden, kept) / CAP) * CAP


class OtherTokensHead(TwoStageHead):
    def forward(self, hidden: Tensor) -> Tensor:
        return (super().forward(hidden) + 7) % SHAPES["odd"].vocab


class Capped(Planted):
    head_class: type[TwoStageHead] = CappedHead

    def __init__(self, config: Any, two_stage: Any, ops: Ops = Ops(), bits: int = 32) -> None:
        super().__init__(config, two_stage, ops, bits)
        self.head = self.head_class(config.text.hidden_size, two_stage, ops, bits)


class OtherTokens(Capped):
    head_class = OtherTokensHead


class NormLeftOut(TargetGraph):
    """Gives the state before the final norm, and the logits that belong to the one after it."""

    def forward(
        self, embedded: Any, per_layer: Any, position: Any, window_start: Any, output_rows: Any, kv: Any
    ) -> Any:
        before: list[Tensor] = []
        norm, plain = self.target.norm, self.target.norm.forward
        norm.forward = lambda x: before.append(x) or plain(x)
        logits, ids, _, *kv = super().forward(embedded, per_layer, position, window_start, output_rows, kv)
        del norm.forward
        return [logits, ids, before[0], *kv]


CAP = 0.1


@pytest.fixture(scope="module")
def odd(pair_dirs: Pairs) -> Pair:
    """The pair that faults are planted in: the quickest to trace."""
    return open_pair(*pair_dirs("odd"))


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("graph", "kind", "experiment", "detail"),
    [
        ("target", NormLeftOut, STATE, "as if the state comes before"),
        ("drafter", Longer, WINDOW, "as if the window is 1 longer"),
        ("drafter", OtherTokens, HEAD, "100% of drafts"),
    ],
)
def test_faults_of_exported_graphs(
    graph: str, kind: Any, experiment: str, detail: str, bundle: Bundle, odd: Pair, tmp_path: Path
) -> None:
    """The bundle of shape odd with one graph traced anew, wrongly."""
    source, part = bundle("odd"), graph_parts(odd, RECIPES["fp32"])[graph]
    manifest = read_manifest(source)
    for file in source.iterdir():
        if file.stem != graph:
            (tmp_path / file.name).symlink_to(file)
    if graph == "drafter":
        part = replace(part, model=lambda ops: kind(odd.drafter, odd.two_stage, ops))
    else:
        part = replace(part, graph=kind)
    onnx.export_graph(tmp_path, odd, graph, part, manifest.limits)
    found = causes(load_engine(tmp_path, manifest, threads=1), odd)
    assert list(found) == [experiment]
    assert detail in found[experiment]


def drafting(kind: type[Planted], bundle: Path, pair: Pair) -> GraphEngine:
    """A bundle whose drafter is a planted one in eager torch."""
    drafter = load_module(lambda: kind(pair.drafter, pair.two_stage), pair.drafter_weights)
    graph = read_manifest(bundle).graphs["drafter"]
    return opened(bundle, drafter=EagerGraph(DrafterGraph(drafter, pair.shared_kv), graph))


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("kind", "experiment", "detail"),
    [
        (Unscaled, "embedding scale", "as if embeddings are not multiplied"),
        (Below, "position", "as if the position is 1 too low"),
        (Above, "position", "as if the position is 1 too high"),
        (BelowWithRows, "position", "as if position and rows in view are 1 too low"),
        (AboveWithRows, "position", "as if position and rows in view are 1 too high"),
        (NewestMissing, ROWS, "as if the newest row is not in view"),
        (RejectedInView, ROWS, "as if a row that no accepted token wrote is in view"),
        (ShiftedDown, ROWS, "as if rows lie 1 too far down"),
        (ShiftedUp, ROWS, "as if rows lie 1 too far up"),
        (Shorter, WINDOW, "as if the window is 1 shorter"),
    ],
)
def test_faults_of_the_drafter(kind: type[Planted], experiment: str, detail: str, bundle: Bundle, odd: Pair) -> None:
    """As above, without tracing them."""
    found = causes(drafting(kind, bundle("odd"), odd), odd)
    assert list(found) == [experiment]
    assert detail in found[experiment]


@pytest.mark.usefixtures("few_texts")
def test_a_softcap_in_the_graph(bundle: Bundle, pair_dirs: Pairs, tmp_path: Path) -> None:
    """Small enough to make ties of logits, and named in the drafter's config.json, which the reference ignores."""
    target, drafter = pair_dirs("odd")
    changed = shutil.copytree(drafter, tmp_path / "drafter")
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = CAP
    (changed / "config.json").write_text(json.dumps(config))
    pair = open_pair(target, changed)
    found = causes(drafting(Capped, bundle("odd"), pair), pair)
    assert list(found) == [SOFTCAP]
    assert "a softcap of 0.1 makes ties" in found[SOFTCAP]


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("graph", "recipe"),
    [("drafter", replace(RECIPES["fp32"], drafter=Width(4))), ("target", replace(RECIPES["fp32"], linear=Width(4)))],
)
def test_a_graph_of_fewer_bits_than_its_recipe(graph: str, recipe: Recipe, bundle: Bundle, odd: Pair) -> None:
    path = bundle("odd")
    other = Reference(odd, recipe).engine(read_manifest(path))
    found = causes(opened(path, **{graph: other.graphs[graph]}), odd)
    assert list(found) == [f"precision of the {graph}"]


# In the runtime


class Stale(GraphEngine):
    """The newest row is the rejected draft's."""

    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        done = super().verify(last, drafts, sampling)
        if done.accepted < len(drafts):
            for buffer in self.cache.values():
                row = self.position - self.window_start
                buffer[:, row - 1] = buffer[:, row]
        return done


class NoNewestRow(GraphEngine):
    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        done = super().verify(last, drafts, sampling)
        for buffer in self.cache.values():
            buffer[:, self.position - 1] = 0
        return done


class NoRollback(GraphEngine):
    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        done = super().verify(last, drafts, sampling)
        self.position += len(drafts) - done.accepted
        return done


class OldState(GraphEngine):
    """Each round starts from the state that the one before it should have started from."""

    newest: np.ndarray | None = None
    begins = True

    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0) -> Round:
        self.newest = None
        return super().prefill(tokens, sampling, start)

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        self.begins = True
        return super().draft(last, num_draft_tokens)

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        if self.begins:
            self.newest, state = state, state if self.newest is None else self.newest
        self.begins = False
        return super().draft_step(token, state)


class Advancing(GraphEngine):
    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        start = self.position
        drafts = super().draft(last, num_draft_tokens)
        self.position = start
        return drafts

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        step = super().draft_step(token, state)
        self.position += 1
        return step


class Moved(GraphEngine):
    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0) -> Round:
        done = super().prefill(tokens, sampling, start)
        for buffer in self.cache.values():
            buffer[:, 1 : len(tokens)] = buffer[:, : len(tokens) - 1].copy()
        return done


class HalfCache(GraphEngine):
    def run_target(self, tokens: Any, rows: Any) -> list[np.ndarray]:
        outputs = super().run_target(tokens, rows)
        for buffer in self.cache.values():
            buffer[:] = buffer.astype(np.float16)
        return outputs


class ByteCache(GraphEngine):
    def run_target(self, tokens: Any, rows: Any) -> list[np.ndarray]:
        outputs, start = super().run_target(tokens, rows), self.position - self.window_start
        for buffer in self.cache.values():
            new = buffer[:, start : start + len(tokens)]
            scale = np.abs(new).max(-1, keepdims=True) / 127
            new[:] = np.round(new / scale) * scale
        return outputs


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("kind", "experiment", "detail"),
    [
        (Stale, ROWS, "1 of the cache's newest"),
        (NoNewestRow, ROWS, "1 of the cache's newest"),
        (NoRollback, ROWS, "the runtime is at position"),
        (OldState, STATE, "rounds start from a state that is neither"),
        (Advancing, "position", "position and rows in view advance with each draft step"),
        (Moved, ROWS, "the cache's rows lie 1 too far down"),
        (HalfCache, KV, "every number is a float16"),
        (ByteCache, KV, "numbers are close, off what the target wrote by"),
    ],
)
def test_faults_of_the_runtime(
    kind: type[GraphEngine], experiment: str, detail: str, bundle: Bundle, odd: Pair
) -> None:
    found = causes(opened(bundle("odd"), kind), odd)
    assert list(found) == [experiment]
    assert detail in found[experiment]


@pytest.mark.usefixtures("few_texts")
def test_a_fault_of_the_runtime_shows_beside_rounding(bundle: Bundle, pair_dirs: Pairs) -> None:
    found = causes(opened(bundle("e2b", "onnx", "int4"), ByteCache), open_pair(*pair_dirs("e2b")))
    assert list(found) == [KV]
    assert "numbers are close, off what the target wrote by" in found[KV]


# In the pair


def unscaled(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Made for embeddings as the checkpoint stores them."""
    width = drafter["pre_projection.weight"].shape[1] // 2
    drafter["pre_projection.weight"][:, :width] *= width**0.5


def before_norm(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Made for states before the target's norm: its weight, and a typical length, are in the projections."""
    width = drafter["pre_projection.weight"].shape[1] // 2
    target["model.language_model.layers.9.layer_scalar"] /= 64  # which the norm takes out again
    factor = target["model.language_model.norm.weight"].float() * 64 / LENGTH
    drafter["pre_projection.weight"][:, width:] *= factor
    drafter["post_projection.weight"] /= factor.unsqueeze(1)


def shuffled(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Clusters that have nothing to do with their centroids."""
    ordering = drafter["masked_embedding.token_ordering"]
    drafter["masked_embedding.token_ordering"] = ordering[
        torch.randperm(len(ordering), generator=torch.Generator().manual_seed(0))
    ]


def outliers(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """The same drafter, but for rounding: a few columns are so large that a row's scale leaves the others nothing."""
    for name in [name for name in drafter if name.endswith("input_layernorm.weight")]:
        drafter[name][:8] /= 512
        drafter[name.replace("input_layernorm", "self_attn.q_proj")][:, :8] *= 512
    for name in [name for name in drafter if name.endswith("pre_feedforward_layernorm.weight")]:
        drafter[name][:8] /= 512
        for part in ("gate_proj", "up_proj"):
            drafter[name.replace("pre_feedforward_layernorm", f"mlp.{part}")][:, :8] *= 512


LENGTH = 5.0  # root mean square of the built-in target's states before their norm, about


@pytest.mark.parametrize(
    ("tamper", "recipe", "experiment", "detail"),
    [
        (unscaled, "fp32", "embedding scale", "if embeddings are not multiplied by sqrt(hidden size): the drafter was"),
        (before_norm, "fp32", STATE, "if the state comes before the target's final norm: the drafter was made for"),
        (shuffled, "fp32", HEAD, "with a dense head"),
        (outliers, "int8", "precision of the drafter", "with the drafter in fp32"),
    ],
)
def test_faults_of_the_pair(
    tamper: Callable[..., None],
    recipe: str,
    experiment: str,
    detail: str,
    bundle: Bundle,
    pair_dirs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A drafter that wants something else than it is given, in the place of a bundle's graphs."""
    monkeypatch.setattr(diagnosis, "OPENINGS", 8 if tamper is shuffled else 5)  # the others cost more
    target, drafter = (shutil.copytree(source, tmp_path / source.name) for source in pair_dirs("demo"))
    tensors, of_target = load_file(drafter / "model.safetensors"), load_file(target / "model.safetensors")
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    tamper(tensors, of_target)
    save_file(tensors, drafter / "model.safetensors", {"format": "pt"})
    save_file(of_target, target / "model.safetensors", {"format": "pt"})
    pair = open_pair(target, drafter)
    manifest = replace(read_manifest(bundle("demo")), recipe=recipe)
    found = causes(Reference(pair, RECIPES[recipe]).engine(manifest), pair, [[manifest.bos]], 24)
    assert next(iter(found)) == experiment
    assert detail in found[experiment]


def test_what_sees_the_answer_is_not_judged_by_acceptance() -> None:
    assert {fault.label for fault in diagnosis.FAULTS if fault.change.sees_ahead} == {
        "position and rows in view are 1 too high",
        "position and rows in view advance with each draft step",
        "a row that no accepted token wrote is in view",
        "rows lie 1 too far up",
    }


def test_faults_of_the_bundle_come_first_then_what_gains_most() -> None:
    experiments = [
        Experiment("little", "finding", "", {"gain": 0.1}),
        Experiment("nothing", "pass", ""),
        Experiment("much", "finding", "", {"gain": 0.3}),
        Experiment("bundle", "finding", ""),
    ]
    assert [e.experiment for e in Diagnosis(experiments, None).findings] == ["bundle", "much", "little"]


# The template, and the command


def test_a_chat_template_is_missing(tmp_path: Path) -> None:
    target, bundle = tmp_path / "target", tmp_path / "bundle"
    target.mkdir()
    bundle.mkdir()
    assert check_template(bundle, target, []).verdict == "skipped"
    (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '<|turn>' }}"}))
    assert "template in tokenizer_config.json, the bundle has no" in check_template(bundle, target, []).detail
    (target / "chat_template.jinja").write_text("{{ '<|turn>user' }}")
    missing = check_template(bundle, target, [])
    assert missing.verdict == "finding"
    assert "template in chat_template.jinja, the bundle has no" in missing.detail
    shutil.copy(target / "chat_template.jinja", bundle)
    assert check_template(bundle, target, [[5]]).verdict == "pass"  # no tokenizer tells what a turn begins with
    marks = [{"id": 105, "content": "<|turn>"}, {"id": 106, "content": "<turn|>"}, {"id": 2, "content": "<bos>"}]
    (bundle / "tokenizer.json").write_text(json.dumps({"added_tokens": marks}))
    assert check_template(bundle, target, [[2, 105, 9]]).verdict == "pass"
    plain = check_template(bundle, target, [[2, 105, 9], [2, 9], [106]])
    assert plain.verdict == "finding"
    assert plain.detail.startswith("prompt 1, 2 has no <|turn>")
    (bundle / "chat_template.jinja").write_bytes(b"{{ '<|turn>user' }}\xff")
    assert check_template(bundle, target, [[2, 9]]).verdict == "finding"
    (bundle / "tokenizer.json").write_text("{}")
    assert check_template(bundle, target, [[2, 9]]).verdict == "pass"
    (bundle / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 105}]}))
    with pytest.raises(InputError, match="added_tokens are malformed \\(KeyError: 'content'\\); export"):
        check_template(bundle, target, [[2, 9]])


@pytest.mark.usefixtures("few_texts")
def test_doctor_command(run: Run, bundle: Bundle, pair_dirs: Pairs, tmp_path: Path) -> None:
    """Exit codes, JSON and the line that names the most likely cause."""
    target, drafter = pair_dirs("odd")
    changed = shutil.copytree(target, tmp_path / "target")
    (ids := tmp_path / "ids.json").write_text("[[5, 6], [7]]")
    common = ("--drafter", drafter, "--prompt-ids", ids, "--max-new-tokens", 8)
    code, out, err = run("doctor", bundle("odd"), "--target", changed, *common, "--json")
    facts = json.loads(out)
    assert (code, facts["findings"]) == (0, 0)
    assert 0 <= facts["acceptance_rate"] <= 1
    assert {"experiment", "verdict", "detail", "error", "least_change"} <= facts["experiments"][0].keys()
    assert "none of 12 experiments found a cause" in err
    (changed / "chat_template.jinja").write_text("{{ '<|turn>user' }}")
    code, out, err = run("doctor", bundle("odd"), "--target", changed, *common)
    assert code == 1
    assert "FINDING" in out
    assert "failed: doctor: 1 found, most likely chat template: " in err
    other, _ = pair_dirs("e4b")
    assert run("doctor", bundle("odd"), "--target", other, *common)[0] == 2
