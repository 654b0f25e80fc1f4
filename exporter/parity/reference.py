"""The reference that a bundle is compared with: its pair in eager torch, with the weights that its recipe stores.

To save memory, float weights are mapped from the checkpoint's file and quantized weights stay integers; each matrix is
widened to a float dtype only while it is used. A target then needs little more memory than its recipe takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from exporter.checkpoint.folding import folded_weights
from exporter.checkpoint.names import EMBEDDING
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.stored_target import RowsOnRead, Weight, load_stored, rows_reader, stored_ops, stored_weights
from exporter.checkpoint.tensors import IntegerReader, ScaledReader
from exporter.graphs.backend import load_backend
from exporter.graphs.parts import graph_parts
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.graphs.tables import OutsideTable, outside_tables
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Matrix, Ops
from exporter.modeling.target import Target
from exporter.quantization.recipes import Recipe
from exporter.quantization.widths import Width
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import EMBEDDING as TOKEN_ROWS
from runtime_ref.manifest import HEAD, PER_LAYER, Graph, Manifest


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """Write rows in place, as a bundle does."""
    cache[:, int(position) : int(position) + rows.shape[1]] = rows
    return cache


def _differing(pair: Pair, widths: Mapping[str, Width]) -> set[str]:
    """The target's weights whose stored form is not the checkpoint's: they are rounded, folded or widened."""
    floats = folded_weights(pair.mapped_target_weights, pair.folding)
    return set(widths) | {name for name, read in floats.items() if isinstance(read, ScaledReader | IntegerReader)}


def _stored_rows(table: OutsideTable, read: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return table.stored(read(ids))


class Reference:
    """A pair in eager torch with the weights that a recipe stores.

    Attributes:
        pair: the checkpoints.
        recipe: how their weights are stored.
        backend: its module, which decides scales and how inputs are rounded.
        target_weights: the target's weights in their stored form, by parameter name.
        drafter_weights: the drafter's weights in their stored form, by parameter name.
    """

    def __init__(self, pair: Pair, recipe: Recipe, backend: str = "onnx") -> None:
        """Read the weights that a bundle of a backend, a key of `BACKENDS`, stores by a recipe."""
        self.pair, self.recipe, self.backend = pair, recipe, load_backend(backend)
        parts, scales = graph_parts(pair, recipe), self.backend.supported_scales()
        # Where nothing is rounded, nothing need be folded: the target computes the same, and its weights stay mapped.
        target = parts["target"]
        changed = set() if recipe.is_exact else _differing(pair, target.widths) & target.weights.keys()
        self.target_weights = stored_weights(pair, changed)
        self.target_weights |= {name: target.whole(name, scales) for name in changed}
        for table in outside_tables(pair, recipe).values():
            if not table.is_kept:
                self.target_weights[table.name] = RowsOnRead(
                    partial(_stored_rows, table, rows_reader(pair, table.name))
                )
        self.drafter_weights: dict[str, Weight] = {
            name: parts["drafter"].whole(name, scales) for name in parts["drafter"].weights
        }
        self.drafter_weights["target_embed_tokens.weight"] = self.target_weights[EMBEDDING]

    def target(self, dtype: torch.dtype = torch.float32, int8_activations: bool = False) -> Target:
        """Return the target, computing in a dtype, perhaps with inputs rounded to 8 bits as the backend does."""
        return load_stored(lambda: self.pair.new_target(self._ops(dtype, int8_activations)), self.target_weights)

    def drafter(self, dtype: torch.dtype = torch.float32, int8_activations: bool = False) -> Drafter:
        """Return the drafter; the arguments are those of `target`."""
        pair, ops = self.pair, self._ops(dtype, int8_activations)
        return load_stored(
            lambda: Drafter(pair.drafter, pair.two_stage, ops, self.recipe.head.bits), self.drafter_weights
        )

    def _ops(self, dtype: torch.dtype, int8_activations: bool) -> Ops:
        # Integers of the checkpoint stay integers here also where the bundle has floats, and rounds no inputs.
        rounds = int8_activations and not self.recipe.is_exact
        return replace(stored_ops(dtype, self.backend.rounded_inputs if rounds else None), write_rows=_write_rows)

    def engine(self, manifest: Manifest) -> GraphEngine:
        """Return an engine for a bundle's manifest that runs this pair instead of the bundle's graphs and tables."""
        target, drafter = self.target(), self.drafter()
        graphs = {
            "target": EagerGraph(TargetGraph(target, cache_outputs=False), manifest.graphs["target"]),
            "drafter": EagerGraph(DrafterGraph(drafter, self.pair.shared_kv), manifest.graphs["drafter"]),
        }
        tables: dict[str, Matrix] = {TOKEN_ROWS: target.embed_tokens, PER_LAYER: target.embed_tokens_per_layer}
        if target.lm_head is not None:
            tables[HEAD] = target.lm_head
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
    """A table in eager torch with the interface of a bundle's table, `runtime_ref.graph_engine.EmbeddingTable`."""

    def __init__(self, table: Matrix) -> None:
        self._table = table

    @torch.no_grad()
    def __getitem__(self, ids: Sequence[int]) -> np.ndarray:
        return self._table.ops.embedding(torch.tensor(ids), self._table.weight).numpy()
