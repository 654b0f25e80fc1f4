"""A pair in eager torch, as a recipe stores it or as the checkpoints do: what a bundle is judged against.

Weights stay small: those of a checkpoint are mapped from their file, those of few bits are kept so, and each is widened
while it is used. A target of any size then needs little more memory than its recipe takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.checkpoint.names import target_weights
from exporter.checkpoint.pair import Pair
from exporter.graphs.parts import graph_parts
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.graphs.tables import EMBEDDING, PER_LAYER, PER_LAYER_SCALES
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops, ScaledEmbedding, rms_norm
from exporter.modeling.target import Target
from exporter.modeling.weights import AnyModule, load_module
from exporter.quantization.numbers import FLOAT, Quantized, Scales, Width, quantize
from exporter.quantization.recipes import Recipe
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import Graph, Manifest

_ROWS = 1 << 14  # widened at a time


@dataclass(frozen=True)
class LookedUp:
    """Per-layer embeddings [V, layers*P] that are rounded row by row, when they are looked up."""

    rows: Tensor
    width: Width

    def __getitem__(self, ids: Tensor) -> Tensor:
        return quantize(self.rows[ids].float(), self.width, PER_LAYER_SCALES).dequantize()


Weight = Tensor | Quantized | LookedUp


def reference_ops(dtype: torch.dtype, rounded: bool = False) -> Ops:
    """Operations on weights as they are stored, in a dtype.

    `rounded` layers of few bits take activations of 8 bits, one scale for each row: as XNNPACK does, where ONNX Runtime
    has one for each block. Where they stay as they are, the result is the recipe's weights', exactly.
    """

    def linear(x: Tensor, weight: Weight) -> Tensor:
        assert not isinstance(weight, LookedUp)
        if isinstance(weight, Tensor):
            return torch.cat([F.linear(x, rows.to(dtype)) for rows in weight.split(_ROWS)], dim=-1)
        x = _rounded(x) if rounded else x
        parts = zip(weight.numbers.split(_ROWS), weight.scales.split(_ROWS), strict=True)
        return torch.cat([F.linear(x, Quantized(*p, weight.bits).dequantize().to(dtype)) for p in parts], dim=-1)

    def embedding(ids: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Quantized):
            weight = Quantized(weight.numbers[ids], weight.scales[ids], weight.bits).dequantize()
            return weight.to(dtype)
        return weight[ids].to(dtype)

    def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return rms_norm(x, None if weight is None else weight.to(dtype), eps)

    return Ops(linear=linear, embedding=embedding, rms_norm=norm, write_rows=_write_rows)


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """In place, as a bundle does."""
    cache[:, int(position) : int(position) + rows.shape[1]] = rows
    return cache


def _rounded(x: Tensor) -> Tensor:
    """Activations as integers of 8 bits, times a scale for each row [.., 1]; zero stays zero."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round() * scale


class Reference:
    """A pair as a recipe stores it."""

    def __init__(self, pair: Pair, recipe: Recipe, scales: Scales = Scales()) -> None:
        """`scales` are what a backend's can be."""
        self.pair, self.recipe, self.scales = pair, recipe, scales
        mapped = target_weights(pair.target_checkpoint, pair.target, mapped=True)
        self.target_weights: dict[str, Weight] = {name: read() for name, read in mapped.items()}
        parts = graph_parts(pair, recipe)
        quantized = (name for name in parts["target"].widths if name != PER_LAYER)
        self.target_weights |= {name: parts["target"].whole(name, scales) for name in quantized}
        if recipe.per_layer != FLOAT:
            width = Width(recipe.per_layer.bits, pair.target.hidden_size_per_layer_input)
            rows = self.target_weights[PER_LAYER]
            assert isinstance(rows, Tensor)
            self.target_weights[PER_LAYER] = LookedUp(rows, width)
        self.drafter_weights: dict[str, Weight] = {
            name: parts["drafter"].whole(name, scales) for name in parts["drafter"].weights
        }
        self.drafter_weights["target_embed_tokens.weight"] = self.target_weights[EMBEDDING]

    def target(self, dtype: torch.dtype = torch.float32, rounded: bool = False) -> Target:
        return _load(lambda: Target(self.pair.target, reference_ops(dtype, rounded)), self.target_weights)

    def drafter(self, dtype: torch.dtype = torch.float32, rounded: bool = False) -> Drafter:
        pair, ops = self.pair, reference_ops(dtype, rounded)
        return _load(lambda: Drafter(pair.drafter, pair.two_stage, ops, self.recipe.head.bits), self.drafter_weights)

    def engine(self, manifest: Manifest) -> GraphEngine:
        """This pair in the place of a bundle's graphs and tables."""
        target, drafter = self.target(), self.drafter()
        graphs = {
            "target": EagerGraph(TargetGraph(target, cache_outputs=False), manifest.graphs["target"]),
            "drafter": EagerGraph(DrafterGraph(drafter, self.pair.shared_kv), manifest.graphs["drafter"]),
        }
        tables = {"embed_tokens": target.embed_tokens, "embed_tokens_per_layer": target.embed_tokens_per_layer}
        return GraphEngine(manifest, graphs, {name: EagerTable(table) for name, table in tables.items()})


class EagerGraph:
    """A graph's module, run as a bundle's graph is."""

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        self.module, self._inputs = module, graph.inputs
        self._kv: list[Tensor] = []

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self._kv = [torch.from_numpy(cache[name]) for name in self._inputs if name in cache]

    @torch.no_grad()
    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        outputs = self.module(*(torch.from_numpy(array) for array in inputs.values()), self._kv)
        return [output.numpy() for output in outputs]


class EagerTable:
    """An embedding, looked up as a bundle's table is."""

    def __init__(self, embedding: ScaledEmbedding) -> None:
        self._embedding = embedding

    @torch.no_grad()
    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        return self._embedding.ops.embedding(torch.tensor(ids), self._embedding.weight).numpy()


def _same(weight: Tensor) -> Tensor:
    return weight


def _load(build: Callable[[], AnyModule], weights: Mapping[str, Weight]) -> AnyModule:
    """`load_module` for weights that need not be tensors."""
    module = load_module(build, {n: partial(_same, w) for n, w in weights.items() if isinstance(w, Tensor)})
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
            setattr(module.get_submodule(owner), leaf, weight)
    return module
