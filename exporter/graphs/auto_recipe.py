"""The recipe that keeps what a target's checkpoint stores: its integers, and the grids that its floats lie on."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.backend import load_backend
from exporter.graphs.parts import graph_parts, sample_rows, tables_outside_graphs
from exporter.graphs.tables import table_bytes
from exporter.quantization.numbers import lies_on_grid
from exporter.quantization.recipes import (
    AUTO,
    CLUSTERS,
    DENSE_HEAD,
    PER_LAYER_TABLE,
    RECIPES,
    Recipe,
    Rule,
    allowed_widths,
    dividing,
    matrices,
)
from exporter.quantization.widths import FLOAT, QAT_GROUP_SIZE, Width, held
from runtime_ref.errors import InputError

# Widths whose grids are looked for, the smallest first. `int4` keeps those of 4 bits in a matrix and of 3 in the table.
GRIDS = (Width(4, 128), Width(4, QAT_GROUP_SIZE), Width(8))
GRIDS_OF_TABLE = (Width(3), Width(4), Width(4, QAT_GROUP_SIZE), Width(8))


def auto_recipe(pair: Pair) -> tuple[Recipe, str]:
    """Return the recipe that `auto` stands for, and the reason, for people.

    Packed integers are kept, and what such a checkpoint leaves in floats stays so, but for its tables. Floats that lie
    on a grid of few bits are stored on it. All else is as in `int4`.

    Args:
        pair: the target and its drafter.
    """
    base, packed = RECIPES["int4"], _packed_widths(pair)
    widths = {**_grid_widths(pair, base), **packed}
    if not widths:
        return base, "its 4-bit weights fit a phone; --recipe fp32 rounds nothing, at nine times the size"
    reason = "it keeps the integers of the checkpoint"
    if not packed:
        reason, table = "it keeps the grids that weights of the checkpoint lie on", widths.get(PER_LAYER_TABLE)
        if table is not None:
            extra = table_bytes(pair, PER_LAYER, table) - table_bytes(pair, PER_LAYER, base.per_layer)
            reason += f"; --recipe int4 rounds the per-layer embeddings to {base.per_layer}, {extra} bytes less"
    names = [f"{model}.{name}" for model, part in graph_parts(pair, base).items() for name in matrices(part.shapes)]
    rules = (*_rules(widths, names), *base.rules)
    used = {id(next(rule for rule in rules if fnmatchcase(name, rule.match))) for name in names}
    return Recipe(AUTO, tuple(rule for rule in rules if id(rule) in used)), reason


def _packed_widths(pair: Pair) -> dict[str, Width]:
    """Widths of packed integers, and of what a checkpoint with such leaves in floats, by the names in recipes."""
    packed = {name: read.width for name, read in pair.checkpoint_weights.items() if isinstance(read, IntegerReader)}
    if not packed:
        return {}
    part = graph_parts(pair, RECIPES["fp32"])["target"]
    floats = matrices(part.shapes).keys() - {EMBEDDING, PER_LAYER, pair.head}
    if pair.rounds_activations:  # those kernels multiply floats, and are fast for 4 bits alone
        packed = {n: Width(4) if width == Width(2) and n in part.weights else width for n, width in packed.items()}
    return {f"target.{name}": width for name, width in {**dict.fromkeys(sorted(floats), FLOAT), **packed}.items()}


def _grid_widths(pair: Pair, base: Recipe) -> dict[str, Width]:
    """Widths of matrices in floats on a grid that `base` would not keep, by the names in recipes."""
    widths = {}
    for model, part in graph_parts(pair, RECIPES["fp32"]).items():
        for name, (_, columns) in matrices(part.shapes).items():
            named, read = f"{model}.{name}", part.weights.get(name)
            if read is None or named in (CLUSTERS, DENSE_HEAD):  # a dense head may still become one of clusters
                continue
            width = _grid(read, columns, GRIDS)
            # Groups of 32 are kept wherever a recipe asks for 4 bits.
            if width is not None and (width.bits != 4 or base.width(named).bits != 4):
                widths[named] = width
    width = _grid(pair.checkpoint_weights[PER_LAYER], pair.target.hidden_size_per_layer_input, GRIDS_OF_TABLE)
    return widths if width is None or width == base.per_layer else {**widths, PER_LAYER_TABLE: width}


def _grid(read: Callable[[], Tensor], columns: int, candidates: tuple[Width, ...]) -> Width | None:
    """The first width whose grid floats lie on, in pieces of so many columns, as far as some of the rows tell."""
    if isinstance(read, IntegerReader):
        return None
    rows = sample_rows(next(row_blocks(read))).reshape(-1, columns)
    fitting = (width for width in candidates if columns % (width.group_size or columns) == 0)
    return next((width for width in fitting if lies_on_grid(rows, width)), None)


def _rules(widths: Mapping[str, Width], names: Iterable[str]) -> Iterator[Rule]:
    """A rule for each matrix, or one for those of all layers where they agree; `names` are all there are."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), []).append(name)
    for pattern, alike in by_pattern.items():
        found = {name: widths[name] for name in alike if name in widths}
        if len(found) == len(alike) and len(set(found.values())) == 1:
            yield Rule(pattern, found[alike[0]])
        else:
            yield from (Rule(name, width) for name, width in found.items())


def refuse_rounding(pair: Pair, recipe: Recipe, backend: str) -> None:
    """Check that a recipe and a backend leave the integers and scales of a checkpoint as they are.

    Args:
        pair: the target and its drafter.
        recipe: how many bits each matrix is stored in.
        backend: a key of `exporter.graphs.backend.BACKENDS`.

    Raises:
        InputError: the recipe asks for fewer bits than some have, or for a width that no runtime has in their groups,
            or the backend has no such scales of groups.
    """
    outside, allowed = tables_outside_graphs(pair), load_backend(backend).supported_scales()
    for name, read in pair.checkpoint_weights.items():
        if not isinstance(read, IntegerReader):
            continue
        named, asked = f"target.{name}", recipe.width(f"target.{name}")
        asked = asked if name in outside else dividing(asked, read.columns)
        kept = held(read.width, asked, read.columns)
        if kept is None or kept not in allowed_widths(named):
            raise InputError(
                f"recipe {recipe.name}: stores {named} in {asked}, but {pair.target_checkpoint.directory} has it in"
                f" {read.width}, and packed integers are not rounded again; pass --recipe"
                f" {'auto, which keeps them' if recipe.name != AUTO else 'fp32'}"
            )
        in_groups = name not in outside and kept.bits < 8 and kept.group_size is not None
        if in_groups and read.scales is not None and not all(allowed.holds(block).all() for block in read.scales()):
            raise InputError(
                f"--backend {backend}: {pair.target_checkpoint.directory} has scales of {named} that are negative, zero"
                f" or no {str(allowed.dtype).removeprefix('torch.')}, which it does not take for groups of numbers;"
                " export with --backend onnx"
            )
