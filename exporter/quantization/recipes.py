"""Recipes: how many bits each part of a pair is stored in."""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.quantization.numbers import FLOAT, QAT_GROUP, Width

GROUPED4 = Width(4, 128)


@dataclass(frozen=True)
class Recipe:
    """Widths of a pair's parts. Norms, scalars and centroids stay float32 in all of them.

    `linear` are the target's linear layers, `embedding` its token embedding, which is the head as well, `per_layer` its
    per-layer embeddings (PLE), with one scale for each token and layer. The drafter has rows of its own: `drafter` for
    its linear layers, `head` for its output embedding, in clusters or dense. Linear layers below 32 bits take
    activations of 8 bits, made while they run; look-ups and clusters do not.
    """

    linear: Width = FLOAT
    embedding: Width = FLOAT
    per_layer: Width = FLOAT
    drafter: Width = FLOAT
    head: Width = FLOAT


RECIPES: Mapping[str, Recipe] = {
    "fp32": Recipe(),
    "int8": Recipe(Width(8), Width(8), Width(8), Width(8), Width(8)),
    # 3 bits for PLE are what brings E4B below 3.6 GB; more would buy less elsewhere.
    "int4": Recipe(GROUPED4, GROUPED4, Width(3), Width(8), Width(4)),
    "smallest": Recipe(Width(4), Width(4), Width(2), Width(4), Width(4)),
}


def target_widths(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Width]:
    """Width of each parameter of `Target` that is not float32."""
    special = {"embed_tokens.weight": recipe.embedding, "embed_tokens_per_layer.weight": recipe.per_layer}
    return _matrices(shapes, special, recipe.linear)


def drafter_widths(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Width]:
    """Width of each parameter of `Drafter` that is not float32, but for clusters, which have a layout of their own."""
    two_stage = ("head.centroids", "head.clusters", "head.scales", "head.token_ids")
    special = {"head.weight": recipe.head, **dict.fromkeys(two_stage, FLOAT)}
    return _matrices(shapes, special, recipe.drafter)


def _matrices(shapes: Mapping[str, tuple[int, ...]], special: Mapping[str, Width], width: Width) -> dict[str, Width]:
    widths = {}
    for name, shape in shapes.items():
        found = special.get(name, width) if len(shape) == 2 else FLOAT
        if found.bits < 8 and shape[1] % QAT_GROUP:
            found = Width(8)  # XNNPACK's layers of 4 bits have groups of 32 or multiples
        if found != FLOAT:
            widths[name] = found
    return widths
