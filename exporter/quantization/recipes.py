"""Recipes: how many bits each matrix of a pair is stored in. The named ones are files of this package."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from exporter.quantization.widths import BITS_OF_TABLE, FLOAT, QAT_GROUP_SIZE, WIDTHS, WIDTHS_OF_CLUSTERS, Width
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, Manifest

PER_LAYER_TABLE = "target.embed_tokens_per_layer.weight"
DENSE_HEAD = "drafter.head.weight"
CLUSTERS = "drafter.head.clusters"  # in its place: one stored form for all
# What else belongs to clusters stays as it is, and the embedding that a drafter reads is stored as the target's.
_NOT_STORED_BY_RULES = ("head.centroids", "head.scales", "head.token_ids", "target_embed_tokens.weight")

AUTO = "auto"


@dataclass(frozen=True)
class Rule:
    """A line of a recipe.

    Attributes:
        match: pattern of names as in a shell; names are `target.` or `drafter.` and a parameter of that module.
        width: how the matrices that it matches are stored.
    """

    match: str
    width: Width


@dataclass(frozen=True)
class Recipe:
    """Widths of a pair's matrices; norms, scalars and centroids stay float32 in every recipe.

    Linear layers of fewer than 32 bits quantize their inputs to 8 bits while they run; reading embedding rows and
    scoring clusters do not.

    Attributes:
        name: its name, or that of its file.
        rules: the first that matches a matrix decides; a matrix that none matches stays float32.
    """

    name: str
    rules: tuple[Rule, ...] = ()

    def width(self, name: str) -> Width:
        """Return the width of a matrix, by its name with `target.` or `drafter.`."""
        return next((rule.width for rule in self.rules if fnmatchcase(name, rule.match)), FLOAT)

    @property
    def per_layer(self) -> Width:
        """Width of the per-layer embeddings (PLE), whose scales are one for each token and layer."""
        return self.width(PER_LAYER_TABLE)

    @property
    def head(self) -> Width:
        """Width of the clusters of the drafter's head."""
        return self.width(CLUSTERS)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded."""
        return all(rule.width == FLOAT for rule in self.rules)

    def toml(self) -> str:
        """Return the text of its file, which `read_recipe` reads."""
        lines = (
            f"  {{ match = {json.dumps(rule.match)}, bits = {rule.width.bits}"
            + (f", group = {rule.width.group_size}" if rule.width.group_size else "")
            + " },"
            for rule in self.rules
        )
        return "\n".join(("rules = [", *lines, "]\n"))


def read_recipe(file: Path) -> Recipe:
    """Read a recipe from a file: TOML with `rules`, a list of tables with `match`, `bits` and perhaps `group`.

    Raises:
        InputError: the file cannot be read, is no TOML, or a rule is not one.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a recipe ({error}); expected TOML with `rules`") from error
    if unknown := [key for key in content if key != "rules"]:
        raise InputError(f"{file}: has the key {unknown[0]!r}, expected `rules` alone; remove it")
    rules = content.get("rules")
    if not isinstance(rules, list):
        raise InputError(
            f'{file}: has no list `rules`; expected such as rules = [{{ match = "target.*", bits = 4, group = 128 }}]'
        )
    return Recipe(file.name, tuple(_rule(file, number, rule) for number, rule in enumerate(rules, 1)))


def _rule(file: Path, number: int, rule: Any) -> Rule:
    form = {"match": str, "bits": int, "group": int}
    if not isinstance(rule, dict) or not {"match", "bits"} <= rule.keys() <= form.keys():
        raise InputError(f"{file}: rule {number} is {rule!r}, expected the keys match, bits and perhaps group")
    if wrong := [key for key, value in rule.items() if type(value) is not form[key]]:
        kind = form[wrong[0]].__name__
        raise InputError(f"{file}: rule {number}: {wrong[0]} is {rule[wrong[0]]!r}, expected {kind}")
    width = Width(rule["bits"], rule.get("group"))
    if width not in WIDTHS + BITS_OF_TABLE:
        expected = ", ".join(map(str, dict.fromkeys(BITS_OF_TABLE + WIDTHS)))
        raise InputError(f"{file}: rule {number} for {rule['match']!r} is {width}, expected one of {expected}")
    return Rule(rule["match"], width)


RECIPES: Mapping[str, Recipe] = {
    name: Recipe(name, read_recipe(Path(str(files("exporter.quantization") / "named" / f"{name}.toml"))).rules)
    for name in ("fp32", "int8", "int4", "smallest")
}


def recipe_of(manifest: Manifest) -> Recipe:
    """Return the recipe by which a bundle's matrices were stored: a rule for each, as its manifest lists them.

    Raises:
        InputError: the manifest lists none, as those of earlier versions, and names no recipe of this version.
    """
    entries = manifest.raw.get("widths")
    if entries is None:
        if manifest.recipe not in RECIPES:
            expected = ", ".join(RECIPES)
            raise InputError(
                f"{MANIFEST}: recipe {manifest.recipe!r} is unknown; expected one of {expected}; export it again"
            )
        return RECIPES[manifest.recipe]
    try:
        rules = [Rule(str(n), Width(e["bits"], e["group_size"])) for e in entries for n in e["matrices"]]
        wrong = [rule.match for rule in rules if rule.width not in allowed_widths(rule.match)]
    except (KeyError, TypeError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise InputError(f"{MANIFEST}: widths is malformed ({wrong[0]}); export the bundle again")
    return Recipe(manifest.recipe, tuple(rules))


def check_recipe(recipe: Recipe, names: Iterable[str]) -> None:
    """Check that each rule decides about some matrix, and that each matrix can be stored as it says.

    Args:
        recipe: the recipe.
        names: all matrices of a pair, with `target.` or `drafter.`.

    Raises:
        InputError: a rule decides about none, or a width is not one of those that runtimes have.
    """
    unused, names = list(recipe.rules), list(names)
    for name in names:
        rule = next((rule for rule in recipe.rules if fnmatchcase(name, rule.match)), None)
        if rule is None:
            continue
        unused = [other for other in unused if other is not rule]
        if rule.width not in allowed_widths(name):
            raise InputError(
                f"recipe {recipe.name}: the rule for {rule.match!r} stores {name} in {rule.width}, expected"
                f" {', '.join(map(str, allowed_widths(name)))}"
            )
    if unused:
        whether = "matches" if not any(fnmatchcase(name, unused[0].match) for name in names) else "comes too late for"
        which = "no matrix" if whether == "matches" else "all that it matches"
        raise InputError(
            f"recipe {recipe.name}: the rule for {unused[0].match!r} {whether} {which}; the first rule that matches a"
            f" name decides, and names are such as {', '.join(names[:: max(1, len(names) // 4)][:4])}"
        )


def allowed_widths(name: str) -> tuple[Width, ...]:
    """Return how a matrix can be stored, by its name in recipes."""
    if name == CLUSTERS:
        return WIDTHS_OF_CLUSTERS
    return BITS_OF_TABLE if name == PER_LAYER_TABLE else WIDTHS


def stored_widths(recipe: Recipe, model: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Width]:
    """Return the width of each parameter of a module that is not stored in float32, by name.

    Clusters are left out, because they have a layout of their own (`exporter.quantization.numbers.quantize_clusters`).

    Args:
        recipe: widths of the matrices.
        model: `target` or `drafter`.
        shapes: shape of each parameter of `Target` or `Drafter`, by name.
    """
    widths = {}
    for name, shape in matrices(shapes).items():
        width = recipe.width(f"{model}.{name}")
        if f"{model}.{name}" != PER_LAYER_TABLE:
            width = dividing(width, shape[1])
        if width != FLOAT and name != "head.clusters":
            widths[name] = width
    return widths


def dividing(width: Width, columns: int) -> Width:
    """Return a width, or 8 bits for columns that XNNPACK's 4-bit linear layers do not divide into groups of 32."""
    return Width(8) if width.bits < 8 and columns % QAT_GROUP_SIZE else width


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that recipes are about."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and name not in _NOT_STORED_BY_RULES}
