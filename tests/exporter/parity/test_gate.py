"""Limits on quality and size: the figures that they judge, on a good bundle and a spoilt one, and JUnit XML."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.special_tokens import suppression
from exporter.parity.checks import Check
from exporter.parity.gate import Gate, gate_checks
from exporter.parity.junit import check_junit, write_junit
from exporter.parity.quality import (
    all_logits,
    bundle_logits,
    kl_divergence,
    logits_after,
    measure_quality,
    quality_checks,
)
from exporter.parity.reference import Reference
from exporter.parity.stages import default_prompts
from exporter.quantization.recipes import RECIPES
from exporter.texts.token_texts import TokenTexts
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.stats import Stats
from tests.conftest import Run
from tests.exports import MAX_SEQ_LEN
from tests.handmade import FEATURES, handmade, with_own_head

Pairs = Callable[[str], tuple[Path, Path]]
TEXT = [3, 200, 17, 45, 45, 9, 120, 7]


@pytest.mark.parametrize("name", ["e2b", "odd"])
@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_logits_of_all_tokens_are_the_references(
    name: str, recipe: str, bundle: Callable[..., Path], pair_dirs: Pairs
) -> None:
    """With a softcap and without one."""
    path = bundle(name, recipe=recipe)
    engine, pair = load_engine(path, read_manifest(path), threads=1), open_pair(*pair_dirs(name))
    top, ids, states = bundle_logits(engine, TEXT)
    actual = all_logits(engine, top, ids, states)
    expected = logits_after(Reference(pair, RECIPES[recipe]).target(int8_activations=True), TEXT, len(TEXT))
    assert torch.equal(actual.gather(1, ids), top)
    torch.testing.assert_close(actual, expected, atol=1e-4 if recipe == "fp32" else 0.4, rtol=0)
    assert float(kl_divergence(expected, actual).abs().max()) < (1e-8 if recipe == "fp32" else 0.02)


def test_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    expected, actual = (torch.randn(5, 40, generator=generator) for _ in range(2))
    theirs = torch.nn.functional.kl_div(
        actual.double().log_softmax(1), expected.double().log_softmax(1), reduction="none", log_target=True
    )
    torch.testing.assert_close(kl_divergence(expected, actual), theirs.sum(1))
    # Tokens that are never chosen have no part in it, on either side.
    for logits in (expected, actual):
        logits[:, 7] = torch.finfo(torch.float32).min
    assert bool((kl_divergence(expected, actual) > 0).all())
    assert float(kl_divergence(expected, expected).abs().max()) == 0


def test_a_head_of_its_own_gives_the_other_logits(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """The bundle's graph has the embedding as its head; the table, which it does not use, has it times -2."""
    made = handmade(bundle("odd"), tmp_path / "made", with_own_head)
    top, ids, states = bundle_logits(load_engine(made, read_manifest(made), threads=1), TEXT)
    tied = all_logits(load_engine(bundle("odd"), read_manifest(bundle("odd")), threads=1), top, ids, states)
    own = all_logits(load_engine(made, read_manifest(made), threads=1), top, ids, states)
    others = torch.ones_like(own).scatter(1, ids, 0).bool()
    torch.testing.assert_close(own[others], -2 * tied[others])
    assert torch.equal(own.gather(1, ids), top)


def test_few_bits_cost_what_they_cost(bundle: Callable[..., Path], pair_dirs: Pairs) -> None:
    pair = open_pair(*pair_dirs("e2b"))
    measured = {}
    for recipe in ("fp32", "int8", "int4"):
        path = bundle("e2b", recipe=recipe)
        measured[recipe] = measure_quality(load_engine(path, read_manifest(path), 1), pair, [TEXT, [5]], 20)
    assert measured["fp32"].whole.kl < 1e-8 < measured["int8"].whole.kl < measured["int4"].whole.kl
    assert measured["fp32"].whole.agreement == 1


def test_quality_is_measured_on_held_out_texts(bundle: Callable[..., Path], pair_dirs: Pairs) -> None:
    """By their kinds, with perplexities against PyTorch's loss; without a tokenizer on the prompts."""
    path, pair = bundle("demo", recipe="int4"), open_pair(*pair_dirs("demo"))
    engine = load_engine(path, read_manifest(path), threads=1)
    texts = TokenTexts(((2, *range(40, 60)), (2, *range(90, 130)), (2, 7, 7, 7)), "made up", ("a x", "b", "a y"))
    quality = measure_quality(engine, pair, [[2]], 4, texts)
    assert {kind: found.positions for kind, found in quality.kinds.items()} == {"a": 25, "b": 41}
    target, losses = Reference(pair, RECIPES["fp32"]).target(), []
    for text in texts.texts:
        logits = logits_after(target, text, len(text))
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="none"))
    expected = float(torch.cat(losses).mean().exp())
    assert quality.whole.perplexity_fp32 == pytest.approx(expected, rel=1e-5)
    assert quality.whole.perplexity == pytest.approx(expected, rel=0.1)
    assert quality.whole.perplexity != quality.whole.perplexity_fp32
    checks = {check.output: check.detail for check in quality_checks(quality, 0.5)}
    assert checks["b against fp32"].startswith(f"KL {quality.kinds['b'].kl:.4f}, ")
    suppressing = replace(pair, tokens=replace(pair.tokens, suppressed=(50,)))  # which the first text has
    weights = {**pair.target_weights, **suppression(suppressing.tokens, 2048)}
    without = measure_quality(engine, replace(suppressing, target_weights=weights), [[2]], 4, texts)
    assert np.isfinite(without.kinds["a"].perplexity_fp32)
    on_answers = measure_quality(engine, pair, [[2]], 4)
    assert on_answers.kinds == {}
    assert np.isnan(on_answers.whole.perplexity)


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        (Gate(), []),
        (Gate(0.9, 0.25, 0.02, 1000), []),
        (Gate(0.90001, 0.26, 0.01, 999), ["choices", "acceptance", "KL", "size"]),
        (Gate(max_kl=0.019), ["KL"]),
    ],
)
def test_limits_are_kept_if_reached(gate: Gate, failed: list[str]) -> None:
    figures = {"choices_kept": 0.9, "acceptance_rate": 0.25, "kl": 0.02, "bundle_bytes": 1000}
    checks = [*gate_checks(gate, figures, "prompts", "texts")]
    assert [check.output for check in checks if not check.passed] == failed
    assert len(checks) == sum(limit is not None for limit in vars(gate).values())


@pytest.mark.parametrize("figures", [{}, {"kl": None}, {"kl": float("nan")}])
def test_what_was_not_measured_fails(figures: dict[str, float | None]) -> None:
    (check,) = gate_checks(Gate(max_kl=1.0), figures, "prompts", "texts")
    assert (check.passed, check.detail) == (False, "not measured (at most 1 asked for)")


@pytest.mark.usefixtures("few_held_out_texts")
def test_a_good_bundle_passes_and_a_spoilt_one_fails(
    run: Run, bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path
) -> None:
    """Both pass parity. The spoilt one has random weights in 4 and 2 bits, on no grid."""
    limits = ("--min-choices", 0.95, "--max-kl", 0.02, "--max-bundle-bytes", "2.5e9", "--max-new-tokens", 16)
    good = ("--target", pair_dirs("demo")[0], "--drafter", pair_dirs("demo")[1])
    code, out, _ = run("parity", bundle("demo", recipe="int4"), *good, *limits, "--json")
    figures = json.loads(out)["figures"]
    assert code == 0
    assert 0.95 <= figures["choices_kept"] <= 1
    assert 0 < figures["kl"] < 0.02

    target, drafter = pair_dirs("dense")
    export_bundle(open_pair(target, drafter), tmp_path / "b", ExportOptions("onnx", RECIPES["smallest"], MAX_SEQ_LEN))
    common = ("parity", tmp_path / "b", "--target", target, "--drafter", drafter, "--json")
    assert run(*common, "--max-new-tokens", 16)[0] == 0
    code, out, err = run(*common, *limits, "--junit", tmp_path / "checks.xml")
    failed = [check for check in json.loads(out)["checks"] if not check["passed"]]
    assert code == 1
    assert {check["rung"] for check in failed} == {"gate"}
    assert "choices" in {check["output"] for check in failed}
    assert "failed, first gate / " in err
    root = ElementTree.parse(tmp_path / "checks.xml").getroot()
    assert root.attrib["failures"] == str(len(failed)) == str(len(root.findall(".//failure")))
    assert any("asked for" in case.attrib["message"] for case in root.findall(".//failure"))


@pytest.mark.parametrize("option", [("--min-choices", 0.5), ("--max-kl", 1)])
def test_comparing_needs_the_checkpoints(option: tuple[str, float], run: Run, bundle: Callable[..., Path]) -> None:
    code, _, err = run("parity", bundle("tiny"), *option)
    assert (code, err.count("\n")) == (2, 1)
    assert "give --target and --drafter" in err


def test_acceptance_and_size_are_judged_without_checkpoints(run: Run, bundle: Callable[..., Path]) -> None:
    common = ("parity", path := bundle("demo"), "--max-new-tokens", 12, "--json")
    engine, stats = load_engine(path, manifest := read_manifest(path), threads=1), Stats()
    for prompt in default_prompts(manifest):
        list(generate(engine, prompt, Options(12, manifest.default_draft_tokens), stats))
    rate = stats.accepted / stats.drafted
    assert 0 < rate < 1
    for limit, passed in ((rate - 0.001, True), (rate + 0.001, False)):
        code, out, _ = run(*common, "--min-acceptance", limit, "--max-bundle-bytes", 1e9)
        checks = {check["output"]: check["passed"] for check in json.loads(out)["checks"] if check["rung"] == "gate"}
        assert (code, checks) == (int(not passed), {"acceptance": passed, "size": True})
        assert json.loads(out)["figures"]["acceptance_rate"] == rate
    for limit in ("0", "x", "-1", "nan", "1e40"):
        assert run(*common, "--max-bundle-bytes", limit)[0] == 2


def test_junit_holds_any_text(tmp_path: Path) -> None:
    file = tmp_path / "checks.xml"
    checks = [Check("a", "one", True, 1e-3, 1e-2), Check("b", 'two <&"\x00\ud800', False, detail="odd \x1b\ufffe")]
    for _ in range(2):  # a second run replaces the first one's
        check_junit(file)
        write_junit(file, Path("bundle"), checks)
    cases = ElementTree.parse(file).getroot().findall(".//testcase")
    assert [case.attrib["name"] for case in cases] == ["one", 'two <&"\ufffd\ufffd']
    assert cases[0].find("system-out").text == "1.0e-03 (allowed 1e-02)"
    assert cases[1].find("failure").attrib["message"] == "odd \ufffd\ufffd"


@pytest.mark.parametrize("feature", ["untied-head", "no-per-layer-embeddings", "kv-float16", "kv-layout"])
def test_what_cannot_be_compared_is_one_line(
    feature: str, run: Run, bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path
) -> None:
    made = handmade(bundle("e2b"), tmp_path / "made", FEATURES[feature][0])
    source = ("--target", pair_dirs("e2b")[0], "--drafter", pair_dirs("e2b")[1])
    for command in ("parity", "doctor"):
        code, _, err = run(command, made, *source)
        assert (code, err.count("\n")) == (2, 1)
        assert f"has the feature {feature}, with which it cannot be compared" in err
    assert run("parity", made, "--max-new-tokens", 4)[0] == 0


def test_without_drafts_nothing_was_measured(run: Run, bundle: Callable[..., Path]) -> None:
    code, out, _ = run("parity", bundle("tiny"), "--max-new-tokens", 1, "--min-acceptance", 0, "--json")
    assert (code, json.loads(out)["figures"]["acceptance_rate"]) == (1, None)
    assert json.loads(out)["checks"][-1]["detail"] == "not measured (at least 0 asked for)"


def test_checks_of_an_earlier_run_do_not_stay(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "checks.xml"
    write_junit(file, Path("bundle"), [Check("a", "one", True)])
    assert run("parity", tmp_path / "missing", "--junit", file)[0] == 2
    assert not file.exists()


@pytest.mark.parametrize(
    "content",
    [
        *("text", "<html></html>", "", "<testsuites name='pytest tests'></testsuites>"),
        *(f"<?xml version='1.0' encoding='{name}'?><testsuites/>" for name in ("gb2312", "nothing")),
    ],
)
def test_junit_replaces_nothing_else(content: str, run: Run, bundle: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "notes.xml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"exists and is no JUnit XML of an earlier `parity`; choose another file"):
        check_junit(file)
    assert run("parity", bundle("tiny"), "--junit", file)[0] == 2
    assert file.read_text() == content
