"""Run texts through a target of which one layer's weights at a time are in memory."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.stored_target import rows_reader
from exporter.checkpoint.tensors import IntegerReader
from exporter.graphs.parts import GraphParts
from exporter.graphs.tables import outside_tables
from exporter.modeling.layers import Ops
from exporter.modeling.target import TargetPass, empty_kv
from exporter.modeling.weights import set_parameter
from exporter.quantization.numbers import Quantized, Scales, fitting_width, quantize
from exporter.quantization.recipes import Recipe, dividing
from exporter.quantization.second_order import Inputs, add_products, part_columns
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.errors import InputError

PROJECTION = "per_layer_model_projection.weight"

# Matrices with the same inputs as another of their layer, whose sums serve for both.
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class LayerByLayer:
    """A target whose module has no weights but those that are put into it.

    Attributes:
        pair: the target and its drafter.
        part: the target's weights.
        target: the module.
    """

    def __init__(self, pair: Pair, part: GraphParts) -> None:
        self.pair, self.part = pair, part
        with torch.device("meta"):
            self.target = pair.new_target(Ops(linear=self._linear)).eval()
        self._names: dict[int, str] = {}  # of the module's weights, by id
        self._largest: dict[str, Tensor] = {}  # magnitudes of inputs, by name, while they are collected
        self._grams: dict[str, list[Tensor]] = {}  # sums of products of inputs, by name, while they are collected
        self.load(n for n in part.weights if not n.startswith("layers.") and n not in (pair.head, "suppressed"))

    @property
    def num_layers(self) -> int:
        """Number of the target's layers."""
        return self.pair.target.num_hidden_layers

    def layer_weights(self, i: int) -> list[str]:
        """Return the names of a layer's weights."""
        return [name for name in self.part.weights if name.startswith(f"layers.{i}.")]

    def load(self, names: Iterable[str]) -> None:
        """Give the module the checkpoint's weights of these names."""
        for name in names:
            self.put(name, self.part.weights[name]())

    def unload(self, names: Iterable[str]) -> None:
        """Take the weights of these names from the module."""
        for name in names:
            self.put(name, None)

    def put(self, name: str, value: Tensor | None) -> None:
        """Give the module a weight, or take it from it."""
        self._names = {i: other for i, other in self._names.items() if other != name}
        set_parameter(self.target, name, value)
        if value is not None:
            self._names[id(self.target.get_parameter(name))] = name

    def begin(
        self, texts: Iterable[tuple[int, ...]], embedding: Quantized | None, recipe: Recipe, allowed: Scales
    ) -> list[TargetPass]:
        """Return the passes of texts of token ids before the first layer.

        Args:
            texts: token ids.
            embedding: what is stored of the token embedding; None to round its rows to the nearest.
            recipe: how tables are stored.
            allowed: which scales the backend can store.
        """
        first, passes, target, pair = torch.zeros(1, dtype=torch.int64), [], self.target, self.pair
        rows = {name: rows_reader(pair, name) for name in (EMBEDDING, PER_LAYER)}
        tables = {table.name: table for table in outside_tables(pair, recipe).values()}
        width = dividing(recipe.width(f"target.{EMBEDDING}"), pair.target.hidden_size)
        rounds = width != FLOAT and EMBEDDING not in tables
        rounds = rounds and not isinstance(pair.target_weights[EMBEDDING], IntegerReader)
        for text in texts:
            ids = torch.tensor(text)
            found = {name: read(ids) for name, read in rows.items()}
            if embedding is not None:
                found[EMBEDDING] = embedding.rows(ids)
            elif rounds:
                fitting = fitting_width(width, found[EMBEDDING])
                found[EMBEDDING] = quantize(found[EMBEDDING], fitting, allowed).dequantize()
            found |= {name: table.stored(found[name]) for name, table in tables.items()}
            per_layer = target.embed_tokens_per_layer.scaled(found[PER_LAYER])
            scaled = target.embed_tokens.scaled(found[EMBEDDING]), per_layer
            passes.append(target.begin(*scaled, first, first, empty_kv(pair.target, len(text))))
        return passes

    def run_layer(self, i: int, passes: list[TargetPass], move_on: bool = True) -> None:
        """Run a layer on all texts, whose passes either move on or stay where they are."""
        for text in passes:
            self.target.run_layer(i, text if move_on else replace(text, kv=list(text.kv)))

    def drop_kv(self, i: int, passes: list[TargetPass]) -> None:
        """Free a layer's K and V if no later layer reads them."""
        config = self.pair.target
        if i < config.num_kv_layers and config.kv_source(config.layer_types[i]) != i:
            for text in passes:
                text.kv[2 * i] = text.kv[2 * i + 1] = torch.empty(0)

    def inputs(self, widths: dict[str, Width], run: Callable[[], object]) -> dict[str, Inputs]:
        """Return what matrices are multiplied with, by name.

        Args:
            widths: the matrices, and how each will be stored.
            run: runs texts through the module.

        Raises:
            InputError: the inputs are not finite.
        """
        shapes = self.part.shapes
        self._grams = {_collected_for(name): _empty_grams(shapes[name], width) for name, width in widths.items()}
        run()
        found = {name: self._prepared(name, self._grams.pop(name)) for name in list(self._grams)}
        return {name: found[_collected_for(name)] for name in widths}

    def largest_inputs(self, names: Iterable[str], run: Callable[[], object]) -> dict[str, Tensor]:
        """Return the largest magnitude [columns] float32 of each input that matrices are multiplied with, by name.

        Args:
            names: the matrices.
            run: runs texts through the module.

        Raises:
            InputError: the inputs are not finite.
        """
        self._largest = {name: torch.zeros(self.part.shapes[name][1]) for name in names}
        run()
        found, self._largest = self._largest, {}
        for name, largest in found.items():
            self._check_finite(name, [largest])
        return found

    def collect_states(self, passes: list[TargetPass]) -> None:
        """Run what `inputs` is to see for the head, after the last layer."""
        for text in passes:
            add_products(self._grams[self.pair.head], self.target.norm(text.x))

    def _prepared(self, name: str, grams: list[Tensor]) -> Inputs:
        self._check_finite(name, grams)
        return Inputs.of(grams)

    def _check_finite(self, name: str, sums: list[Tensor]) -> None:
        if not all(part.isfinite().all() for part in sums):
            directory = self.pair.target_checkpoint.directory
            raise InputError(
                f"{directory}: the texts of the calibration give {name} inputs that are not finite; restore the"
                " checkpoint, or pass --no-calibrate"
            )

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        name = self._names[id(weight)]
        if (grams := self._grams.get(name)) is not None:
            add_products(grams, x)
        if name in self._largest:
            self._largest[name] = torch.maximum(self._largest[name], x.abs().amax(0))
        return F.linear(x, weight)


def _collected_for(name: str) -> str:
    """The matrix whose inputs are collected for this one: itself, or another of its layer with the same inputs."""
    leaf = name.split(".")[-2]
    return name.replace(leaf, SAME_INPUTS.get(leaf, leaf))


def _empty_grams(shape: tuple[int, ...], width: Width) -> list[Tensor]:
    columns = shape[1]
    size = part_columns(columns, width.group_size)
    return [torch.zeros(size, size) for _ in range(columns // size)]
