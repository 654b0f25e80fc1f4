"""The doctor names faults that are planted in the graphs of a bundle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair, open_pair
from exporter.graphs import onnx
from exporter.graphs.parts import graph_parts
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops, additive_mask
from exporter.modeling.two_stage import TwoStageHead
from exporter.modeling.weights import load_module
from exporter.parity.reference import EagerGraph, Reference
from exporter.quantization.recipes import RECIPES, Recipe, Rule
from exporter.quantization.widths import Width
from runtime_ref.engine import load_engine
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import read_manifest
from tests.exporter.doctor.engines import HEAD, ROWS, SOFTCAP, STATE, WINDOW, Bundle, Pairs, findings, load_bundle
from tests.pairs import SHAPES

SMALL_CAP = 0.1  # a softcap so small that logits tie


class Planted(Drafter):
    """A drafter with a fault, in code that shares nothing with `exporter.doctor.faults`."""

    position_offset = 0  # of queries
    view_offset = 0  # of the visible rows
    nearest_row = 1  # how far the newest visible row lies before the position
    window_change = 0

    def step(
        self, embedded: Tensor, states: Tensor, positions: Tensor, window_start: Tensor, kv: Any
    ) -> tuple[Tensor, Tensor]:
        return super().step(embedded, states, positions + self.position_offset, window_start, kv)

    def _mask(self, layer_type: str, positions: Tensor, window_start: Tensor, rows: int) -> Tensor:
        text, sliding = self.config.text, layer_type == "sliding_attention"
        rows_at = torch.arange(rows) + (window_start if sliding else 0)
        behind = positions.unsqueeze(1) - self.position_offset + self.view_offset - rows_at
        visible = behind >= self.nearest_row
        if sliding:
            visible &= behind <= text.sliding_window + 1 + self.window_change
        return additive_mask(visible, text.num_attention_heads // text.attention(layer_type).num_key_value_heads)


class Unscaled(Planted):
    def step(self, embedded: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return super().step(embedded / self.target_embed_tokens.scale, *rest)


class Below(Planted):
    position_offset = -1


class Above(Planted):
    position_offset = 1


class BelowWithRows(Planted):
    position_offset, view_offset = -1, -1


class AboveWithRows(Planted):
    position_offset, view_offset = 1, 1


class NewestMissing(Planted):
    nearest_row = 2


class RejectedInView(Planted):
    nearest_row = 0


class ShiftedDown(Planted):
    def step(self, embedded: Tensor, states: Tensor, positions: Tensor, start: Tensor, kv: Any) -> Any:
        kv = {layer_type: tuple(torch.cat((p[:, :1], p[:, :-1]), 1) for p in parts) for layer_type, parts in kv.items()}
        return super().step(embedded, states, positions, start, kv)


class ShiftedUp(Planted):
    def step(self, embedded: Tensor, states: Tensor, positions: Tensor, start: Tensor, kv: Any) -> Any:
        kv = {layer_type: tuple(torch.cat((p[:, 1:], p[:, -1:]), 1) for p in parts) for layer_type, parts in kv.items()}
        return super().step(embedded, states, positions, start, kv)


class Shorter(Planted):
    window_change = -1


class Longer(Planted):
    window_change = 1


class CappedHead(TwoStageHead):
    def _logits(self, hidden: Tensor, kept: Tensor) -> Tensor:
        return torch.tanh(super()._logits(hidden, kept) / SMALL_CAP) * SMALL_CAP


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


class StateBeforeNorm(TargetGraph):
    """Returns the state before the final norm, with the logits of the state after it."""

    def forward(
        self, embedded: Any, per_layer: Any, position: Any, window_start: Any, output_rows: Any, kv: Any
    ) -> Any:
        before: list[Tensor] = []
        norm, plain = self.target.norm, self.target.norm.forward
        norm.forward = lambda x: before.append(x) or plain(x)
        logits, ids, _, *kv = super().forward(embedded, per_layer, position, window_start, output_rows, kv)
        del norm.forward
        return [logits, ids, before[0], *kv]


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("graph", "graph_class", "experiment", "detail"),
    [
        ("target", StateBeforeNorm, STATE, "as if the state comes before"),
        ("drafter", Longer, WINDOW, "as if the window is 1 longer"),
        ("drafter", OtherTokens, HEAD, "100% of drafts"),
    ],
)
def test_faults_of_exported_graphs(
    graph: str, graph_class: Any, experiment: str, detail: str, bundle: Bundle, odd: Pair, tmp_path: Path
) -> None:
    """One graph of a bundle is traced again with a fault."""
    source, part = bundle("odd"), graph_parts(odd, RECIPES["fp32"])[graph]
    manifest = read_manifest(source)
    for file in source.iterdir():
        if file.stem != graph:
            (tmp_path / file.name).symlink_to(file)
    if graph == "drafter":
        part = replace(part, model=lambda ops: graph_class(odd.drafter, odd.two_stage, ops))
    else:
        part = replace(part, graph=graph_class)
    onnx.export_graph(tmp_path, odd, graph, part, manifest.limits)
    details = findings(load_engine(tmp_path, manifest, threads=1), odd)
    assert list(details) == [experiment]
    assert detail in details[experiment]


def with_drafter(drafter_class: type[Planted], bundle: Path, pair: Pair) -> GraphEngine:
    """A bundle's engine whose drafter is of another class, in eager torch."""
    drafter = load_module(lambda: drafter_class(pair.drafter, pair.two_stage), pair.drafter_weights)
    graph = read_manifest(bundle).graphs["drafter"]
    return load_bundle(bundle, drafter=EagerGraph(DrafterGraph(drafter, pair.shared_kv), graph))


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(
    ("drafter_class", "experiment", "detail"),
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
def test_faults_of_the_drafter(
    drafter_class: type[Planted], experiment: str, detail: str, bundle: Bundle, odd: Pair
) -> None:
    """Faults of a drafter in eager torch, which is quicker than tracing each."""
    details = findings(with_drafter(drafter_class, bundle("odd"), odd), odd)
    assert list(details) == [experiment]
    assert detail in details[experiment]


@pytest.mark.usefixtures("few_texts")
def test_a_softcap_in_the_graph(bundle: Bundle, pair_dirs: Pairs, tmp_path: Path) -> None:
    """The softcap makes ties of logits. The drafter's config.json names it, and the reference ignores it."""
    target, drafter = pair_dirs("odd")
    changed = shutil.copytree(drafter, tmp_path / "drafter")
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = SMALL_CAP
    (changed / "config.json").write_text(json.dumps(config))
    pair = open_pair(target, changed)
    details = findings(with_drafter(Capped, bundle("odd"), pair), pair)
    assert list(details) == [SOFTCAP]
    assert "a softcap of 0.1 makes ties" in details[SOFTCAP]


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(("graph", "matrices"), [("drafter", "drafter.layers.*"), ("target", "target.layers.*")])
def test_a_graph_of_fewer_bits_than_its_recipe(graph: str, matrices: str, bundle: Bundle, odd: Pair) -> None:
    path = bundle("odd")
    recipe = Recipe("fp32", (Rule(matrices, Width(4)),))
    other = Reference(odd, recipe).engine(read_manifest(path))
    details = findings(load_bundle(path, **{graph: other.graphs[graph]}), odd)
    assert list(details) == [f"precision of the {graph}"]
