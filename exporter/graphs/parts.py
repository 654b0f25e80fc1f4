"""What each graph of a pair holds in a recipe: a module, a reader for each weight, and the width it is stored in."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import row_blocks
from exporter.graphs.spec import DrafterGraph, TargetGraph
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target
from exporter.modeling.weights import Weights, parameter_shapes
from exporter.quantization.numbers import FLOAT, Quantized, Scales, Width, fitting_width, quantize, quantize_clusters
from exporter.quantization.recipes import Recipe, drafter_widths, target_widths
from runtime_ref.manifest import Progress

SAMPLE_ROWS = 64  # that show which grid a matrix lies on

# Embeddings that a runtime looks up itself: a graph holds them only where it multiplies by them.
LOOKED_UP = ("embed_tokens_per_layer.weight", "target_embed_tokens.weight")


@dataclass(frozen=True)
class GraphParts:
    """One graph: `model(ops)` has the parameters that `weights` read, `graph` gives it the graph's inputs and outputs.

    `widths` are those of the weights that are not float32, `shapes` those of the model's parameters.
    """

    model: Callable[[Ops], nn.Module]
    graph: Callable[[nn.Module, bool], nn.Module]
    weights: Weights
    widths: Mapping[str, Width]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def stored_bytes(self) -> int:
        """What its weights take at most, with scales of groups of 32 in float32."""
        bits = dict.fromkeys(self.weights, 32) | {name: width.bits + 1 for name, width in self.widths.items()}
        if "head.scales" in bits:
            bits["head.clusters"] = 8  # packed already
        return sum(prod(self.shapes[name]) * bits[name] // 8 for name in self.weights)

    @property
    def few_bits(self) -> int:
        """How many numbers it has that are not float32."""
        return sum(prod(self.shapes[name]) for name in self.widths if name in self.weights)

    def blocks(
        self, name: str, scales: Scales = Scales(), progress: Progress = lambda *_: None
    ) -> Iterator[Tensor | Quantized]:
        """A weight as it is stored, in blocks of rows.

        Args:
            scales: what the backend's of 4-bit weights can be; those of 8-bit ones are float32.
            progress: told of each block, in bytes of float32.
        """
        yield from quantized_blocks(self.weights[name], self.widths.get(name), scales, lambda n: progress(name, n))

    def whole(self, name: str, scales: Scales = Scales(), progress: Progress = lambda *_: None) -> Tensor | Quantized:
        """A weight as it is stored."""
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
    """What a reader reads, in blocks of rows, quantized if there is a width."""
    fitting = None
    for block in row_blocks(read):
        if width is None:
            yield block
        else:
            fitting = fitting or fitting_width(width, block[:: max(1, len(block) // SAMPLE_ROWS)])
            yield quantize(block, fitting, Scales() if width.bits == 8 else scales)
        progress(4 * block.numel())


def graph_parts(pair: Pair, recipe: Recipe) -> dict[str, GraphParts]:
    """The graphs `target` and `drafter` of a pair, by name."""

    def target(ops: Ops) -> nn.Module:
        return Target(pair.target, ops)

    def drafter(ops: Ops) -> nn.Module:
        return Drafter(pair.drafter, pair.two_stage, ops, recipe.head.bits)

    drafter_weights = dict(pair.drafter_weights)
    if pair.two_stage is not None and recipe.head != FLOAT:
        drafter_weights |= _quantized_clusters(pair.drafter_weights["head.clusters"], pair, recipe.head.bits)

    def parts(
        model: Callable[[Ops], nn.Module],
        graph: Callable[..., nn.Module],
        weights: Weights,
        widths: Callable[[Recipe, Mapping[str, tuple[int, ...]]], dict[str, Width]],
    ) -> GraphParts:
        shapes = parameter_shapes(lambda: model(Ops()))
        held = {name: read for name, read in weights.items() if name not in LOOKED_UP}
        return GraphParts(model, graph, held, widths(recipe, shapes), shapes)

    return {
        "target": parts(target, TargetGraph, pair.target_weights, target_widths),
        "drafter": parts(drafter, lambda m, _: DrafterGraph(m, pair.shared_kv), drafter_weights, drafter_widths),
    }


def _quantized_clusters(read: Callable[[], Tensor], pair: Pair, bits: int) -> dict[str, Callable[[], Tensor]]:
    """Readers of a two-stage head's clusters and scales."""
    sizes = pair.two_stage
    assert sizes is not None

    def clusters() -> tuple[Tensor, Tensor]:
        return quantize_clusters(read().view(sizes.num_clusters, sizes.cluster_size, -1), bits)

    return {"head.clusters": lambda: clusters()[0].flatten(1), "head.scales": lambda: clusters()[1]}
