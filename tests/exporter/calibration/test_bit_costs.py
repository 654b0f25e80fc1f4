"""What bits cost: measured as an export would round, and widths that are chosen by it."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from exporter import memory
from exporter.bundle import export
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.calibration.bit_costs import CLASSES, Cost, _Candidates, bytes_to_measure, candidates, measure_costs
from exporter.calibration.bits_plot import bits_picture
from exporter.calibration.calibrate import calibrate
from exporter.calibration.choice import Bits
from exporter.calibration.divergence import RunningDivergence
from exporter.checkpoint.pair import Pair, open_pair
from exporter.files import directory_bytes
from exporter.graphs.backend import load_backend
from exporter.graphs.bundle_bytes import bytes_beside_matrices
from exporter.graphs.parts import graph_parts
from exporter.modeling.target import SUPPRESSED_LOGIT
from exporter.parity.quality import kl_divergence, logits_after
from exporter.parity.reference import Reference
from exporter.quantization.numbers import Scales
from exporter.quantization.recipes import RECIPES, Recipe, Rule, check_recipe, matrices, read_recipe
from exporter.quantization.widths import FLOAT, Width
from exporter.texts.token_texts import TokenTexts
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from tests.conftest import Run
from tests.exporter.checkpoint.forms import edit_json, edit_tensors
from tests.exports import MAX_SEQ_LEN

Pairs = Callable[[str], tuple[Path, Path]]


def random_texts(seed: int, count: int = 6, tokens: int = 20) -> TokenTexts:
    ids = torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return TokenTexts(tuple(map(tuple, ids.tolist())), "random ids")


def logits_of(pair: Pair, recipe: Recipe, texts: TokenTexts) -> torch.Tensor:
    target = Reference(pair, recipe).target()
    return torch.cat([logits_after(target, text, len(text)) for text in texts.texts])


def untied(pair_dirs: Pairs, tmp_path: Path, name: str = "e2b") -> tuple[Path, Path]:
    """A pair whose target has a head of its own."""
    target, drafter = pair_dirs(name)
    target = shutil.copytree(target, tmp_path / "untied")
    edit_tensors(target, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].flip(0)}))
    edit_json(target / "config.json", tie_word_embeddings=False)
    return target, drafter


@pytest.mark.parametrize("name", ["e2b", "e4b", "odd", "untied"])
@torch.no_grad()
def test_costs_are_those_of_recipes_that_round_one_class(name: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    """The divergence is that of the whole target with the stored weights of such a recipe."""
    own_head = name == "untied"
    pair, texts = open_pair(*(untied(pair_dirs, tmp_path) if own_head else pair_dirs(name))), random_texts(0, 3)
    done: list[int] = []
    costs, positions = measure_costs(pair, load_backend("onnx"), texts, None, lambda _, amount: done.append(amount))
    assert sum(done) == bytes_to_measure(pair)
    assert [(cost.matrices, cost.width) for cost in costs] == candidates(own_head)
    assert positions == texts.num_tokens
    exact, titles = logits_of(pair, RECIPES["fp32"], texts), [title for title, _ in candidates(own_head)]
    for cost in costs:
        before = itertools.takewhile(lambda title, cost=cost: title != cost.matrices, titles)
        rules = *(Rule(CLASSES[title], FLOAT) for title in before), Rule(CLASSES[cost.matrices], cost.width)
        rounded = logits_of(pair, Recipe("one", rules), texts)
        kl, kept = kl_divergence(exact, rounded).mean(), (exact.argmax(1) == rounded.argmax(1)).double().mean()
        assert cost.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-9)
        assert cost.choices_kept == pytest.approx(float(kept), abs=0.02)
        assert cost.kl > 0


def test_classes_cover_each_matrix_of_the_target_once(pair_dirs: Pairs, tmp_path: Path) -> None:
    """And each has some: no rule of a chosen recipe decides about nothing."""
    for name in ("e2b", "e4b", "odd", "tiny", "untied"):
        pair = open_pair(*(untied(pair_dirs, tmp_path) if name == "untied" else pair_dirs(name)))
        titles = dict.fromkeys(title for title, _ in candidates(name == "untied"))
        costs = [Cost(title, Width(8), 0, 0.0, 1.0) for title in titles]
        recipe = Bits(tuple(costs), 0, 1, "", None).choices()[0].recipe("all")
        both = graph_parts(pair, recipe).items()
        check_recipe(recipe, [f"{model}.{n}" for model, part in both for n in matrices(part.shapes)])
        parts = Reference(pair, recipe)
        assert not [name for name, weight in parts.target_weights.items() if getattr(weight, "ndim", 0) == 2]


@torch.no_grad()
def test_the_calibrated_cost_of_the_embedding_is_that_of_its_bundle(pair_dirs: Pairs, tmp_path: Path) -> None:
    """Rows go in as they are stored, which a calibration decides at its end."""
    pair, texts, fitted_on = open_pair(*pair_dirs("e2b")), random_texts(0), random_texts(1, 12, 40)
    costs, _ = measure_costs(pair, load_backend("onnx"), texts, fitted_on)
    cost = next(c for c in costs if c.matrices == "embedding and head" and c.width == Width(4, 32))
    recipe = Recipe("one", (Rule("target.embed_tokens.weight", cost.width),))
    rounded = logits_of(calibrate(pair, recipe, Scales(), fitted_on, tmp_path), recipe, texts)
    kl = kl_divergence(logits_of(pair, RECIPES["fp32"], texts), rounded).mean()
    # The calibration's texts went in with rows rounded to the nearest, the unrounded target's without.
    assert cost.kl == pytest.approx(float(kl), rel=0.1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("name", "last", "layers", "heads"),
    [
        ("e2b", "layer 2", [3], 3),
        ("e2b", "embedding and head in 4 bits in groups of 32", [], 2),
        ("untied", "logits of head in 4 bits in groups of 32", [], 1),
    ],
)
def test_a_killed_measurement_goes_on_where_it_was(
    name: str,
    last: str,
    layers: list[int],
    heads: int,
    pair_dirs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the layers and heads that are left, to the costs of one that was not killed."""
    pair = open_pair(*(untied(pair_dirs, tmp_path) if name == "untied" else pair_dirs(name)))
    measure = partial(measure_costs, pair, load_backend("onnx"), random_texts(0, 3), random_texts(1))

    def stop(step: str, _: int) -> None:
        if step == last:
            raise Killed

    whole, directory = measure(), tmp_path / "bits"
    with pytest.raises(Killed):
        measure(stop, directory)
    ran: list[int] = []
    rounded: list[str] = []
    run_layer, round_matrix = _Candidates.run_layer, _Candidates._rounded
    monkeypatch.setattr(_Candidates, "run_layer", lambda self, i, names: (ran.append(i), run_layer(self, i, names)))
    monkeypatch.setattr(
        _Candidates, "_rounded", lambda self, name, width: (rounded.append(name), round_matrix(self, name, width))[1]
    )
    done: list[int] = []
    assert measure(lambda _, amount: done.append(amount), directory) == whole
    assert (sum(done), ran, rounded.count(pair.head)) == (bytes_to_measure(pair), layers, heads)


def test_nothing_is_taken_over_of_other_texts_and_tokens(
    pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor costs that were cut short; what layers made stays."""
    pair, ran = open_pair(*pair_dirs("tiny")), list[int]()
    run_layer = _Candidates.run_layer
    monkeypatch.setattr(_Candidates, "run_layer", lambda self, i, names: (ran.append(i), run_layer(self, i, names)))
    measure = partial(measure_costs, backend=load_backend("onnx"), texts=None, directory=tmp_path)
    layers = list(range(pair.target.num_hidden_layers))
    suppressing = replace(pair, tokens=replace(pair.tokens, suppressed=(7,)))
    for other, texts in ((pair, random_texts(0, 2)), (pair, random_texts(1, 2)), (suppressing, random_texts(1, 2))):
        ran.clear()
        costs = measure(other, held_out=texts)
        assert ran == layers
        for content in ("", "[]", '{"a": 1}'):
            (tmp_path / "costs.json").write_text(content)
            assert measure(other, held_out=texts) == costs
        assert ran == layers


def test_costs_that_are_not_finite_are_refused(pair_dirs: Pairs) -> None:
    pair, name = open_pair(*pair_dirs("tiny")), "layers.1.mlp.down_proj.weight"
    weight = pair.target_weights[name]() * float("inf")
    spoilt = replace(pair, target_weights={**pair.target_weights, name: lambda: weight})
    with pytest.raises(InputError, match="logits are not finite with"):
        measure_costs(spoilt, load_backend("onnx"), random_texts(0, 2, 4), None)


def test_calibrated_costs_are_lower(pair_dirs: Pairs) -> None:
    """On the texts that they were fitted on; widths that are not calibrated cost the same."""
    pair, texts, backend = open_pair(*pair_dirs("e2b")), random_texts(0, 24, 20), load_backend("onnx")
    nearest, calibrated = (measure_costs(pair, backend, texts, fitted_on)[0] for fitted_on in (None, texts))
    lower = 0
    for before, after in zip(nearest, calibrated, strict=True):
        if before.width.bits == 4 and before.matrices != "per-layer embeddings":
            lower += after.kl < before.kl
        else:
            assert after == before
    assert lower >= 10  # of 12


def test_running_divergence_is_that_of_whole_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    expected, actual = (torch.randn(7, 100, generator=generator) * 20 for _ in range(2))
    actual = expected + 0.3 * actual
    expected[:, 33] = actual[:, 33] = SUPPRESSED_LOGIT
    running = RunningDivergence(7)
    for columns in torch.arange(100).split(34):
        running.add(expected[:, columns], actual[:, columns])
    assert running.kl == pytest.approx(float(kl_divergence(expected, actual).mean()), rel=1e-9)
    assert running.choices_kept == float((expected.argmax(1) == actual.argmax(1)).double().mean())
    assert 0 < running.choices_kept < 1


def some_bits() -> Bits:
    generator = torch.Generator().manual_seed(0)
    costs = []
    for title, width in candidates():
        size, kl = torch.rand(2, generator=generator).tolist()
        costs.append(Cost(title, width, int(1000 * size * width.bits), kl / 4**width.bits, 1.0))
    return Bits(tuple(costs), 500, 10, "made-up texts", None)


def test_the_choice_is_the_best_of_its_size() -> None:
    bits = some_bits()
    by_class = [[cost for cost in bits.costs if cost.matrices == title] for title in bits.classes]
    every = [(500 + sum(c.bytes for c in p), sum(c.kl for c in p)) for p in itertools.product(*by_class)]
    smallest = min(size for size, _ in every)
    for limit in (smallest, smallest + 777, smallest + 9000, 10**9):
        chosen = bits.choose(limit)
        assert chosen.bytes <= limit
        assert chosen.kl == min(kl for size, kl in every if size <= limit)
    refused = f"is {smallest - 1}, but the smallest choice, .* needs about {smallest}; pass"
    with pytest.raises(InputError, match=refused):
        bits.choose(smallest - 1)


def test_named_recipes_are_among_the_choices() -> None:
    named = some_bits().named()
    assert set(named) == {"int4", "int8"}
    assert {cost.width.bits for cost in named["int4"].costs} == {3, 4}
    assert {cost.width for cost in named["int8"].costs} == {Width(8)}


def test_the_picture_is_one(tmp_path: Path) -> None:
    bits = some_bits()
    picture = bits_picture(bits, bits.choose(10**9), tmp_path / "p.svg").decode()
    assert "<svg" in picture
    for name in (*bits.classes, "int4", "int8", "chosen"):
        assert name in picture


@pytest.mark.parametrize(("name", "which"), [("demo", [0]), ("e2b", [0, -1]), ("untied", [0, -1])])
def test_bundles_are_as_large_as_estimated(name: str, which: list[int], pair_dirs: Pairs, tmp_path: Path) -> None:
    """At most, and not much smaller; of small pairs the graphs are most of it."""
    dirs, backend = untied(pair_dirs, tmp_path) if name == "untied" else pair_dirs(name), load_backend("onnx")
    pair = open_pair(*dirs)
    costs, positions = measure_costs(pair, backend, random_texts(0, 2, 4), None)
    bits = Bits(tuple(costs), bytes_beside_matrices(pair, backend, RECIPES["int4"]), positions, "", None)
    for choice in (bits.choices()[i] for i in which):
        path = tmp_path / f"{choice.bytes}"
        export_bundle(pair, path, ExportOptions("onnx", choice.recipe("chosen"), MAX_SEQ_LEN))
        assert 0.9 * choice.bytes - 60_000 < directory_bytes(path) <= choice.bytes


def test_the_commands_choose_the_same(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    """`recipe` writes a file that gives the bundle of `export --target-bytes`, byte for byte."""
    target, drafter = pair_dirs("tiny")
    pair, common = ("--target", target, "--drafter", drafter), ("--target-bytes", 5e5, "--no-calibrate")
    files = "--output", tmp_path / "my.toml", "--report", tmp_path / "bits.png"
    code, out, _ = run("recipe", *pair, *common, *files, "--json")
    document = json.loads(out)
    assert (code, document["calibrated_on"]) == (0, None)
    assert document["chosen"]["rules"] == (tmp_path / "my.toml").read_text()
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = run("export", *pair, *common, "--output", tmp_path / "a")
    assert (code, out) == (0, document["chosen"]["rules"])
    assert "chosen for 500000 bytes" in err
    assert run("export", *pair, "--no-calibrate", "--recipe", tmp_path / "my.toml", "--output", tmp_path / "b")[0] == 0
    a, b = (read_manifest(tmp_path / name) for name in "ab")
    assert (a.recipe, b.recipe) == ("chosen", "my.toml")
    assert (a.files, a.raw["widths"]) == (b.files, b.raw["widths"])
    assert read_recipe(tmp_path / "my.toml").rules == document_rules(document)


@pytest.mark.parametrize("command", ["recipe", "export"])
def test_the_commands_go_on_after_a_kill(
    command: str, run: Run, pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what they keep beside their output until it is written."""
    target, drafter = pair_dirs("tiny")
    options = ("--target-bytes", 5e5, "--no-calibrate", "--output", tmp_path / "my")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((Bits, "choose") if command == "recipe" else (export, "export_bundle")), killed)
        assert run(command, "--target", target, "--drafter", drafter, *options)[0] not in (0, 2)
    assert [path.name for path in tmp_path.iterdir()] == [".my.kept"]
    monkeypatch.setattr(_Candidates, "run_layer", killed)
    monkeypatch.setattr(_Candidates, "_run_layers", killed)
    assert run(command, "--target", target, "--drafter", drafter, *options)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["my"]


def document_rules(document: dict) -> tuple[Rule, ...]:
    """What the costs of a document say that was chosen: of each class the cheapest that the sums leave."""
    costs = [
        Cost(c["matrices"], Width(c["width"]["bits"], c["width"]["group_size"]), c["bytes"], c["kl"], c["choices_kept"])
        for c in document["costs"]
    ]
    bits = Bits(tuple(costs), document["other_bytes"], document["positions"], document["held_out"], None)
    return bits.choose(500_000).recipe("chosen").rules


def test_calibrated_bits_by_the_command(
    run: Run, pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random weights, by default; a table is printed, and the recipe after it."""
    target, drafter = pair_dirs("tiny")
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6, 7] * 40]))
    code, out, err = run(
        *("recipe", "--target", target, "--drafter", drafter, "--calibration", tmp_path / "ids.json"),
        *("--target-bytes", 1e9),
    )
    assert code == 0
    table, _, rules = out.partition("rules = [")
    assert "ids.json: 121 tokens are few to calibrate matrices with 128 columns on" in " ".join(err.split())
    assert "MB of memory, 1.0 MB are free" in " ".join(err.split())
    assert "calibrated on ids.json" in " ".join(table.split())
    assert 'match = "target.embed_tokens.weight", bits = 8' in rules


def test_options_that_do_not_go_together(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("tiny")
    pair, output = ("--target", target, "--drafter", drafter), ("--output", tmp_path / "x")
    for command, message in (
        (("recipe", *pair, *output), "--output writes the recipe that is chosen for --target-bytes"),
        (("export", *pair, *output, "--target-bytes", 1, "--recipe", "int4"), "leave out --recipe"),
        (("recipe", *pair, "--calibration", "a.json", "--no-calibrate"), "leave out --no-calibrate"),
        (("recipe", *pair, "--report", tmp_path / "x.txt"), "a picture's name ends in one of"),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert message in err
    code, _, err = run("export", *pair, *output, "--target-bytes", 1, "--no-calibrate")
    assert code == 2
    assert "--target-bytes is 1, but the smallest choice, with the drafter as in int4, needs" in err
    assert not (tmp_path / "x").exists()
