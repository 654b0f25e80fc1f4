"""The doctor finds nothing in bundles without a fault, and names the most likely cause first."""

from dataclasses import replace

import pytest

from exporter.checkpoint.pair import Pair, open_pair
from exporter.doctor import diagnosis
from exporter.doctor.diagnosis import Diagnosis, diagnose
from exporter.doctor.verdicts import Experiment
from exporter.parity.reference import Reference
from exporter.parity.source import open_source
from exporter.quantization.recipes import recipe_of
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from tests.exporter.doctor.engines import HEAD, KV, NEW_TOKENS, ROWS, STATE, WINDOW, Bundle, Pairs, load_bundle


@pytest.mark.parametrize(("name", "recipe"), [("demo", "fp32"), ("odd", "fp32"), ("e2b", "int4")])
def test_nothing_is_found_where_nothing_is_wrong(
    name: str, recipe: str, bundle: Bundle, pair_dirs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "SAMPLED_TEXTS", 5)  # enough to judge acceptance
    path = bundle(name, "onnx", recipe)
    diagnosed = diagnose(load_bundle(path), open_source(path, *pair_dirs(name)), max_new_tokens=NEW_TOKENS)
    assert diagnosed.findings == []
    assert name != "demo" or 0.05 < diagnosed.acceptance_rate < 0.9
    verdicts = {e.experiment: e.verdict for e in diagnosed.experiments}
    exercised = {STATE, "embedding scale", "position", ROWS, KV}
    assert {verdicts[e] for e in exercised} == {"pass"}
    assert recipe != "fp32" or verdicts[WINDOW] == "pass"


@pytest.mark.usefixtures("few_texts")
def test_nothing_is_found_with_a_dense_head(bundle: Bundle, pair_dirs: Pairs) -> None:
    """The drafter is in eager torch, which is quicker than a bundle for this test alone."""
    path, pair = bundle("e2b", "onnx", "int4"), open_pair(*pair_dirs("e2b")).dense
    manifest = read_manifest(path)
    drafter = Reference(pair, recipe_of(manifest)).engine(manifest).graphs["drafter"]
    diagnosed = diagnose(load_bundle(path, drafter=drafter), pair, max_new_tokens=NEW_TOKENS)
    assert diagnosed.findings == []
    assert {e.experiment: e.detail for e in diagnosed.experiments}[HEAD].startswith("none, the head is dense")


@pytest.mark.parametrize(("max_seq_len", "max_draft_tokens", "verdict"), [(6, 8, "skipped"), (16, 1, "pass")])
def test_a_small_context(max_seq_len: int, max_draft_tokens: int, verdict: str, bundle: Bundle, odd: Pair) -> None:
    """Half of the context is left to draft in; prompts that fill it are an error."""
    engine = load_bundle(bundle("odd"))
    engine.manifest = replace(engine.manifest, max_seq_len=max_seq_len, max_draft_tokens=max_draft_tokens)
    diagnosed = diagnose(engine, odd)
    assert diagnosed.findings == []
    assert {e.experiment: e.verdict for e in diagnosed.experiments}[HEAD] == verdict
    needed = min(4, max_draft_tokens) + 1
    with pytest.raises(InputError, match=f"no text had {needed} tokens after its prompt; pass shorter"):
        diagnose(engine, odd, [[5] * (max_seq_len - 1)])


def test_what_sees_the_answer_is_not_judged_by_acceptance() -> None:
    assert {fault.label for fault in diagnosis.FAULTS if fault.change.sees_ahead} == {
        "position and rows in view are 1 too high",
        "position and rows in view advance with each draft step",
        "a row that no accepted token wrote is in view",
        "rows lie 1 too far up",
    }


def test_faults_of_the_bundle_come_first_then_what_gains_most() -> None:
    experiments = [
        Experiment("little", "finding", "", {"gain": 0.1}),
        Experiment("nothing", "pass", ""),
        Experiment("much", "finding", "", {"gain": 0.3}),
        Experiment("bundle", "finding", ""),
    ]
    assert [e.experiment for e in Diagnosis(experiments, None).findings] == ["bundle", "much", "little"]
