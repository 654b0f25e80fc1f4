"""Recipes: how many bits the weights of each part of a pair are stored in."""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.quantization.widths import FLOAT, QAT_GROUP_SIZE, Width

GROUPED4 = Width(4, 128)


@dataclass(frozen=True)
class Recipe:
    """Widths of a pair's parts; norms, scalars and centroids stay float32 in every recipe.

    Linear layers of fewer than 32 bits quantize their inputs to 8 bits while they run; reading embedding rows and
    scoring clusters do not.

    Attributes:
        linear: the target's linear layers.
        embedding: the target's token embedding, which is its head as well.
        per_layer: the target's per-layer embeddings (PLE), with one scale for each token and layer.
        drafter: the drafter's linear layers.
        head: the drafter's output embedding, in clusters or dense.
    """

    linear: Width = FLOAT
    embedding: Width = FLOAT
    per_layer: Width = FLOAT
    drafter: Width = FLOAT
    head: Width = FLOAT


RECIPES: Mapping[str, Recipe] = {
    "fp32": Recipe(),
    "int8": Recipe(Width(8), Width(8), Width(8), Width(8), Width(8)),
    # 3 bits for PLE bring E4B below 3.6 GB; docs/decisions/0007 says more.
    "int4": Recipe(GROUPED4, GROUPED4, Width(3), Width(8), Width(4)),
    "smallest": Recipe(Width(4), Width(4), Width(2), Width(4), Width(4)),
}

AUTO = "auto"


def auto_recipe() -> tuple[str, str]:
    """Return the key of `RECIPES` that `auto` stands for, and the reason, for people. It is `int4` for every pair."""
    return "int4", "its 4-bit weights fit a phone; --recipe fp32 rounds nothing, at nine times the size"


def target_widths(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Width]:
    """Return the width of each parameter of `Target` that is not stored in float32, by name.

    Args:
        recipe: widths of the parts.
        shapes: shape of each parameter of `Target`, by name.
    """
    special = {"embed_tokens.weight": recipe.embedding, "embed_tokens_per_layer.weight": recipe.per_layer}
    return _matrices(shapes, special, recipe.linear)


def drafter_widths(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Width]:
    """Return the width of each parameter of `Drafter` that is not stored in float32, by name.

    The parameters of a two-stage head are left out, because clusters have a layout of their own
    (`exporter.quantization.numbers.quantize_clusters`).

    Args:
        recipe: widths of the parts.
        shapes: shape of each parameter of `Drafter`, by name.
    """
    two_stage = ("head.centroids", "head.clusters", "head.scales", "head.token_ids")
    special = {"head.weight": recipe.head, **dict.fromkeys(two_stage, FLOAT)}
    return _matrices(shapes, special, recipe.drafter)


def _matrices(shapes: Mapping[str, tuple[int, ...]], special: Mapping[str, Width], default: Width) -> dict[str, Width]:
    """Width of each matrix that is not float32: the one in `special`, else the default."""
    widths = {}
    for name, shape in shapes.items():
        width = special.get(name, default) if len(shape) == 2 else FLOAT
        if width.bits < 8 and shape[1] % QAT_GROUP_SIZE:
            width = Width(8)  # XNNPACK's 4-bit linear layers need groups of 32 or a multiple
        if width != FLOAT:
            widths[name] = width
    return widths
