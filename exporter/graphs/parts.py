"""What each graph of a pair consists of under a recipe: a module, a reader for each weight, and its stored width."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.graphs.tables import outside_tables
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.weights import Weights, parameter_shapes
from exporter.quantization.numbers import Quantized, Scales, fitting_width, quantize, quantize_clusters
from exporter.quantization.recipes import CLUSTERS, Recipe, stored_widths
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.manifest import Progress

SAMPLE_ROWS = 64  # about so many rows of a matrix's first block decide its group size


def tables_outside_graphs(pair: Pair) -> set[str]:
    """Return the parameters whose rows the runtime reads from files; in most targets the embedding is the head too."""
    return {PER_LAYER, EMBEDDING, "target_embed_tokens.weight"} - {pair.head}


@dataclass(frozen=True)
class GraphParts:
    """One graph of a pair, not traced yet, and its weights, not read yet.

    Attributes:
        model: builds the module, `Target` or `Drafter`, with a backend's operations.
        graph: wraps the module in `TargetGraph` or `DrafterGraph`; the flag is `cache_outputs`.
        weights: readers of the module's parameters that the graph's file holds, by name.
        widths: stored width of each of the module's parameters that is quantized, by name.
        shapes: shape of each of the module's parameters, by name.
    """

    model: Callable[[Ops], nn.Module]
    graph: Callable[[nn.Module, bool], nn.Module]
    weights: Weights
    widths: Mapping[str, Width]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def stored_bytes(self) -> int:
        """Upper bound of the size of its stored weights; scales are counted as float32 for groups of 32."""
        return sum(self._stored_bytes(scale_bits=1).values())

    @property
    def number_bytes(self) -> dict[str, int]:
        """Size of each stored weight without its scales."""
        return self._stored_bytes(scale_bits=0)

    def _stored_bytes(self, scale_bits: int) -> dict[str, int]:
        bits = dict.fromkeys(self.weights, 32) | {name: width.bits + scale_bits for name, width in self.widths.items()}
        if "head.scales" in bits:
            bits["head.clusters"] = 8  # its shape is that of the packed bytes
        return {name: prod(self.shapes[name]) * bits[name] // 8 for name in self.weights}

    @property
    def num_quantized_values(self) -> int:
        """Number of values, summed over the quantized weights."""
        return sum(prod(self.shapes[name]) for name in self.widths if name in self.weights)

    def blocks(
        self, name: str, scales: Scales = Scales(), progress: Progress = lambda *_: None
    ) -> Iterator[Tensor | Quantized]:
        """Read a weight and yield it as it is stored, in blocks of rows.

        Args:
            name: a key of `weights`.
            scales: dtype and signs that the backend supports for scales of 4-bit weights; those of 8 bits are float32.
            progress: called with the name and the bytes of float32 of each block.

        Yields:
            Blocks [rows, columns], integers with scales if the weight has a width, else in the dtype it was read in.
        """
        yield from quantized_blocks(self.weights[name], self.widths.get(name), scales, lambda n: progress(name, n))

    def whole(self, name: str, scales: Scales = Scales(), progress: Progress = lambda *_: None) -> Tensor | Quantized:
        """Read a weight and return it as it is stored; the arguments are those of `blocks`."""
        if self.widths.get(name) is None:
            tensor = self.weights[name]()
            progress(name, 4 * tensor.numel())
            return tensor
        return Quantized.join(self.blocks(name, scales, progress))


def quantized_blocks(
    read: Callable[[], Tensor],
    width: Width | None,
    scales: Scales = Scales(),
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Tensor | Quantized]:
    """Read a weight and yield it in blocks of rows, quantized if it has a width.

    Args:
        read: reader of a weight; if it can read blocks of rows, the weight is never in memory as a whole.
        width: bits and preferred group size of the integers; None leaves the weight as it is.
        scales: dtype and signs that scales of less than 8 bits can have; those of 8 bits are float32.
        progress: called with the bytes of float32 of each block.
    """
    if isinstance(read, IntegerReader):
        for stored in read.quantized_blocks():
            yield stored.dequantize() if width is None else stored.held_as(read.kept_in(width))
            progress(4 * stored.numbers.numel())
        return
    fitting = None
    for block in row_blocks(read):
        if width is None:
            yield block
        else:
            fitting = fitting or fitting_width(width, sample_rows(block))
            yield quantize(block, fitting, Scales() if width.bits == 8 else scales)
        progress(4 * block.numel())


def sample_rows(block: Tensor) -> Tensor:
    """Return the rows of a matrix's first block [rows, columns] by which its group size is chosen."""
    return block[:: max(1, len(block) // SAMPLE_ROWS)]


def fitted_width(part: GraphParts, name: str) -> Width:
    """Return the width that a weight of a graph is stored in, with the group size that it asks for.

    Args:
        part: the graph's module and weights.
        name: a key of both `widths` and `weights`.
    """
    read, width = part.weights[name], part.widths[name]
    if isinstance(read, IntegerReader):
        return read.kept_in(width)
    return fitting_width(width, sample_rows(next(row_blocks(read)))) if width.bits <= 4 else width


def all_widths(pair: Pair, recipe: Recipe) -> dict[str, Width]:
    """Return how each matrix of a pair is stored under a recipe that is not float32, by its name in recipes."""
    parts = graph_parts(pair, recipe)
    widths = {
        f"{model}.{name}": fitted_width(part, name)
        for model, part in parts.items()
        for name in part.widths
        if name in part.weights
    }
    widths |= {f"target.{table.name}": table.width for table in outside_tables(pair, recipe).values()}
    if "head.clusters" in parts["drafter"].weights:
        widths[CLUSTERS] = recipe.head
    return {name: width for name, width in widths.items() if width != FLOAT}


def graph_parts(pair: Pair, recipe: Recipe) -> dict[str, GraphParts]:
    """Return what the graphs `target` and `drafter` of a pair consist of, by graph name."""

    def drafter(ops: Ops) -> nn.Module:
        return Drafter(pair.drafter, pair.two_stage, ops, recipe.head.bits)

    drafter_weights, outside = dict(pair.drafter_weights), tables_outside_graphs(pair)
    if pair.two_stage is not None and recipe.head != FLOAT:
        drafter_weights |= _quantized_clusters(pair.drafter_weights["head.clusters"], pair, recipe.head.bits)

    def parts(
        model: Callable[[Ops], nn.Module],
        graph: Callable[..., nn.Module],
        weights: Weights,
        model_name: str,
    ) -> GraphParts:
        shapes = parameter_shapes(lambda: model(Ops()))
        stored = {name: read for name, read in weights.items() if name not in outside}
        return GraphParts(model, graph, stored, stored_widths(recipe, model_name, shapes), shapes)

    return {
        "target": parts(pair.new_target, TargetGraph, pair.target_weights, "target"),
        "drafter": parts(drafter, lambda m, _: DrafterGraph(m, pair.shared_kv), drafter_weights, "drafter"),
    }


def _quantized_clusters(read: Callable[[], Tensor], pair: Pair, bits: int) -> dict[str, Callable[[], Tensor]]:
    """Return readers of a two-stage head's quantized clusters and their scales."""
    sizes = pair.two_stage
    assert sizes is not None

    def clusters() -> tuple[Tensor, Tensor]:
        return quantize_clusters(read().view(sizes.num_clusters, sizes.cluster_size, -1), bits)

    return {"head.clusters": lambda: clusters()[0].flatten(1), "head.scales": lambda: clusters()[1]}
