"""The reference that a bundle is compared with: its pair in eager torch, with the weights that its recipe stores.

To save memory, float weights are mapped from the checkpoint's file and quantized weights stay integers; each matrix is
widened to a float dtype only while it is used. A target then needs little more memory than its recipe takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.checkpoint.folding import folded_weights
from exporter.checkpoint.pair import Pair
from exporter.graphs.parts import graph_parts
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.graphs.tables import EMBEDDING, PER_LAYER, PER_LAYER_SCALES
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops, ScaledEmbedding, rms_norm
from exporter.modeling.target import Target
from exporter.modeling.weights import AnyModule, load_module
from exporter.quantization.numbers import Quantized, Scales, quantize
from exporter.quantization.recipes import Recipe
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import Graph, Manifest

_BLOCK_ROWS = 1 << 10  # rows of a matrix that are widened at once; they stay in a core's cache


@dataclass(frozen=True)
class QuantizedOnRead:
    """Per-layer embeddings whose rows are quantized when they are read.

    Attributes:
        rows: [V, layers*P], the checkpoint's rows in its dtype.
        width: bits of the integers, and how many of a row share a scale.
    """

    rows: Tensor
    width: Width

    def __getitem__(self, ids: Tensor) -> Tensor:
        return quantize(self.rows[ids].float(), self.width, PER_LAYER_SCALES).dequantize()


Weight = Tensor | Quantized | QuantizedOnRead


def reference_ops(dtype: torch.dtype, int8_activations: bool = False) -> Ops:
    """Return operations that accept weights in their stored form.

    Args:
        dtype: float dtype that weights are widened to, and that the operations compute in.
        int8_activations: round the inputs of quantized layers to 8 bits with one scale a row, as XNNPACK does; ONNX
            Runtime has one scale a block. Without it the weights of the recipe are the only source of error.
    """

    def linear(x: Tensor, weight: Weight) -> Tensor:
        assert not isinstance(weight, QuantizedOnRead)
        if isinstance(weight, Tensor):
            return torch.cat([F.linear(x, rows.to(dtype)) for rows in weight.split(_BLOCK_ROWS)], dim=-1)
        x = _rounded_to_8_bits(x) if int8_activations else x
        parts = zip(weight.numbers.split(_BLOCK_ROWS), weight.scales.split(_BLOCK_ROWS), strict=True)
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
    """Write rows in place, as a bundle does."""
    cache[:, int(position) : int(position) + rows.shape[1]] = rows
    return cache


def _rounded_to_8_bits(x: Tensor) -> Tensor:
    """Round activations [.., columns] to 8-bit integers and scale them back, with one scale a row; zero stays zero."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round() * scale


class Reference:
    """A pair in eager torch with the weights that a recipe stores.

    Attributes:
        pair: the checkpoints.
        recipe: how their weights are stored.
        scales: dtype and sign that the backend allows for scales of 4-bit weights.
        target_weights: the target's weights in their stored form, by parameter name.
        drafter_weights: the drafter's weights in their stored form, by parameter name.
    """

    def __init__(self, pair: Pair, recipe: Recipe, scales: Scales = Scales()) -> None:
        self.pair, self.recipe, self.scales = pair, recipe, scales
        parts = graph_parts(pair, recipe)
        quantized = [name for name in parts["target"].widths if name != PER_LAYER]
        # Nothing folded is needed where nothing is rounded: the target computes the same, and mapped weights stay so.
        floats = folded_weights(pair.mapped_target_weights, {} if recipe.is_exact else pair.folding)
        self.target_weights: dict[str, Weight] = {n: read() for n, read in floats.items() if n not in quantized}
        self.target_weights |= {name: parts["target"].whole(name, scales) for name in quantized}
        if recipe.per_layer != FLOAT:
            width = Width(recipe.per_layer.bits, pair.target.hidden_size_per_layer_input)
            rows = self.target_weights[PER_LAYER]
            assert isinstance(rows, Tensor)
            self.target_weights[PER_LAYER] = QuantizedOnRead(rows, width)
        self.drafter_weights: dict[str, Weight] = {
            name: parts["drafter"].whole(name, scales) for name in parts["drafter"].weights
        }
        self.drafter_weights["target_embed_tokens.weight"] = self.target_weights[EMBEDDING]

    def target(self, dtype: torch.dtype = torch.float32, int8_activations: bool = False) -> Target:
        """Return the target; the arguments are those of `reference_ops`."""
        pair, ops = self.pair, reference_ops(dtype, int8_activations)
        return _load(lambda: Target(pair.target, ops, bool(pair.tokens.suppressed)), self.target_weights)

    def drafter(self, dtype: torch.dtype = torch.float32, int8_activations: bool = False) -> Drafter:
        """Return the drafter; the arguments are those of `reference_ops`."""
        pair, ops = self.pair, reference_ops(dtype, int8_activations)
        return _load(lambda: Drafter(pair.drafter, pair.two_stage, ops, self.recipe.head.bits), self.drafter_weights)

    def engine(self, manifest: Manifest) -> GraphEngine:
        """Return an engine for a bundle's manifest that runs this pair instead of the bundle's graphs and tables."""
        target, drafter = self.target(), self.drafter()
        graphs = {
            "target": EagerGraph(TargetGraph(target, cache_outputs=False), manifest.graphs["target"]),
            "drafter": EagerGraph(DrafterGraph(drafter, self.pair.shared_kv), manifest.graphs["drafter"]),
        }
        tables = {"embed_tokens": target.embed_tokens, "embed_tokens_per_layer": target.embed_tokens_per_layer}
        return GraphEngine(manifest, graphs, {name: EagerTable(table) for name, table in tables.items()})


class EagerGraph:
    """A module in eager torch with the interface of a bundle's graph, `runtime_ref.graph_engine.BoundGraph`."""

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        """Take the module that is traced for a graph, and the manifest's entry of that graph."""
        self.module, self._inputs = module, graph.inputs
        self._kv: list[Tensor] = []

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Use these cache buffers [N, S, D] float32, by name, from now on."""
        self._kv = [torch.from_numpy(cache[name]) for name in self._inputs if name in cache]

    @torch.no_grad()
    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the module on the graph's inputs, given in the graph's order, and return its outputs but the cache."""
        outputs = self.module(*(torch.from_numpy(array) for array in inputs.values()), self._kv)
        return [output.numpy() for output in outputs]


class EagerTable:
    """An embedding in eager torch with the interface of a bundle's table, `runtime_ref.graph_engine.EmbeddingTable`."""

    def __init__(self, embedding: ScaledEmbedding) -> None:
        self._embedding = embedding

    @torch.no_grad()
    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        return self._embedding.ops.embedding(torch.tensor(ids), self._embedding.weight).numpy()


def _identity(weight: Tensor) -> Tensor:
    return weight


def _load(build: Callable[[], AnyModule], weights: Mapping[str, Weight]) -> AnyModule:
    """Do what `load_module` does, for weights that need not be tensors."""
    module = load_module(build, {n: partial(_identity, w) for n, w in weights.items() if isinstance(w, Tensor)})
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
            setattr(module.get_submodule(owner), leaf, weight)
    return module
