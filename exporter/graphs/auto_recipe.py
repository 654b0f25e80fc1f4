"""The recipe that keeps what a target's checkpoint stores: its integers, and the grids that its floats lie on."""

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.parts import graph_parts, sample_rows
from exporter.graphs.tables import per_layer_bytes
from exporter.quantization.numbers import lies_on_grid
from exporter.quantization.recipes import AUTO, CLUSTERS, PER_LAYER_TABLE, RECIPES, Recipe, Rule, matrices
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
    base, reason = (
        RECIPES["int4"],
        "its 4-bit weights fit a phone; --recipe fp32 rounds nothing, at nine times the size",
    )
    widths = _packed_widths(pair)
    if widths:
        reason = "it keeps the integers of the checkpoint"
    found = {
        name: width for name, read, shape in _floats(pair) if (width := _grid(pair, name, read, shape)) is not None
    }
    widths |= {name: width for name, width in found.items() if name not in widths and width != base.width(name)}
    if not widths:
        return base, reason
    if not _packed_widths(pair):
        extra = per_layer_bytes(pair, widths.get(PER_LAYER_TABLE, base.per_layer)) - per_layer_bytes(
            pair, base.per_layer
        )
        reason = f"it keeps the grids that weights of the checkpoint lie on; --recipe int4 is {extra} bytes smaller"
    rules = (*_rules(widths), *base.rules)
    names = [f"{model}.{name}" for model, part in graph_parts(pair, base).items() for name in matrices(part.shapes)]
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


def _floats(pair: Pair) -> Iterator[tuple[str, Callable[[], Tensor], int]]:
    """Names in recipes, readers and columns of the matrices that a checkpoint has in floats."""
    for model, part in graph_parts(pair, RECIPES["fp32"]).items():
        for name, (_, columns) in matrices(part.shapes).items():
            read = part.weights.get(name)
            if read is not None and not isinstance(read, IntegerReader) and f"{model}.{name}" != CLUSTERS:
                yield f"{model}.{name}", read, columns
    read = pair.checkpoint_weights[PER_LAYER]
    if not isinstance(read, IntegerReader):
        yield PER_LAYER_TABLE, read, pair.target.hidden_size_per_layer_input


def _grid(pair: Pair, name: str, read: Callable[[], Tensor], columns: int) -> Width | None:
    """The smallest width whose grid a matrix lies on, as far as some of its rows tell; None if there is none."""
    rows = sample_rows(next(row_blocks(read)))
    rows = rows.reshape(-1, columns)  # of the table, one for each token and layer
    for width in GRIDS_OF_TABLE if name == PER_LAYER_TABLE else GRIDS:
        if columns % (width.group_size or columns) == 0 and lies_on_grid(rows, width):
            return width
    return None


def _rules(widths: Mapping[str, Width]) -> Iterator[Rule]:
    """A rule for each matrix, or one for those of all layers where they agree."""
    by_pattern: dict[str, dict[str, Width]] = {}
    for name, width in widths.items():
        by_pattern.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), {})[name] = width
    for pattern, found in by_pattern.items():
        same = len(set(found.values())) == 1
        yield from (
            [Rule(pattern, *set(found.values()))] if same else [Rule(name, width) for name, width in found.items()]
        )


def refuse_rounding(pair: Pair, recipe: Recipe) -> None:
    """Check that a recipe leaves the integers of a checkpoint as they are.

    Raises:
        InputError: it asks for fewer bits than some have.
    """
    for name, read in pair.checkpoint_weights.items():
        asked = recipe.width(f"target.{name}")
        if isinstance(read, IntegerReader) and held(read.width, asked) is None:
            raise InputError(
                f"recipe {recipe.name}: stores target.{name} in {asked}, but the checkpoint has it in {read.width},"
                " which are not rounded again; pass --recipe auto, which keeps them"
            )
