"""The document and tables of `bench`: everything about them that does not depend on the speed of this machine."""

import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.bench.measure import BenchOptions, check_same_text, fitting_contexts, measure_bundle, random_ids
from exporter.bench.speculation import ForcedEngine, expected_tokens, forced_generation, speedups, verify_cost
from exporter.bench.timing import in_turns
from exporter.cli.bench_command import bench_tables
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import CheckError, InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.stats import Stats
from tests.conftest import Run

Bundle = Callable[..., Path]
in_one_process = pytest.mark.xdist_group("bench")  # which measures the document once


@pytest.fixture(scope="module")
def document(bundle: Bundle) -> dict[str, Any]:
    return measure_bundle(bundle("e2b"), BenchOptions(1, (20, 100, 99999), seconds=0.05))


@pytest.fixture
def engine(bundle: Bundle) -> ForcedEngine:
    path = bundle("e2b")
    loaded = load_engine(path, replace(read_manifest(path), eos=frozenset()), threads=1)
    return ForcedEngine(loaded.manifest, loaded.graphs, loaded.tables)


@pytest.mark.parametrize("acceptance", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_expected_tokens_is_the_mean_over_all_outcomes(drafts: int, acceptance: float) -> None:
    mean = 0.0
    for outcome in itertools.product((True, False), repeat=drafts):
        chance = 1.0
        for right in outcome:
            chance *= acceptance if right else 1 - acceptance
        accepted = (*outcome, False).index(False)
        mean += chance * (accepted + 1)
    assert expected_tokens(drafts, acceptance) == pytest.approx(mean)
    if acceptance < 1:
        assert mean == pytest.approx((1 - acceptance ** (drafts + 1)) / (1 - acceptance))


def test_speedups_by_hand() -> None:
    costs = {1: 1.0, 2: 1.2, 4: 2.0}
    assert verify_cost(costs, 3) == pytest.approx(1.6)
    assert speedups(costs, 0.1, 0.5, 3) == pytest.approx([1.5 / 1.3, 1.75 / 1.8, 1.875 / 2.3])
    assert speedups(costs, 0.1, 0.5, 0) == []


def test_number_of_turns_is_between_min_and_max() -> None:
    calls: dict[str, Callable[[], object]] = {"a": lambda: None, "b": lambda: None}
    assert {name: len(times) for name, times in in_turns(calls, 0.0).items()} == {"a": 3, "b": 3}
    assert len(in_turns(calls, 60.0, max_turns=5)["b"]) == 5


@in_one_process
def test_document(document: dict[str, Any], bundle: Bundle) -> None:
    manifest = read_manifest(bundle("e2b"))
    assert json.loads(json.dumps(document)) == document
    assert document.keys() == {
        *("bundle", "machine", "threads", "load_average", "backend", "recipe", "versions", "read_bandwidth_gb_s"),
        *("decode_weights", "load", "contexts", "speedup", "generation"),
    }
    assert (document["backend"], document["recipe"], document["threads"]) == ("onnx", "fp32", 1)
    assert document["decode_weights"]["bytes"] == (bundle("e2b") / "target.weights").stat().st_size
    assert [row["context"] for row in document["contexts"]] == [20, 100]
    for row in document["contexts"]:
        assert [p["tokens"] for p in row["passes"]] == [1, 2, 3, 4, 5, 6, 8, manifest.max_draft_tokens + 1]
        assert row["passes"][0]["cost"] == 1
        assert row["draft_step"]["two_stage_share_of_dense_head"] == (16 + 4 * 16) / 256
        for part in (row["prefill"], row["decode"], row["draft_step"], *row["passes"]):
            assert 0 < part["ms"]["min"] <= part["ms"]["quartile"] <= part["ms"]["median"]
        decode, bandwidth = row["decode"], document["read_bandwidth_gb_s"]["max"]
        read_bytes = decode["share_of_bandwidth"] * bandwidth * decode["ms"]["min"]  # in units of 10^6
        assert read_bytes == pytest.approx(document["decode_weights"]["bytes"] / 1e6)
    for row in document["speedup"]:
        assert len(row["by_num_draft_tokens"]) == manifest.max_draft_tokens
        assert row["best"] == row["by_num_draft_tokens"][row["best_num_draft_tokens"] - 1]
    assert [row["acceptance"] for row in document["speedup"]] == [0.3, 0.5, 0.7, 0.9] * 2


@in_one_process
def test_load_is_measured_in_a_process_of_its_own(document: dict[str, Any]) -> None:
    load = document["load"]
    assert load["seconds"]["min"] > 0
    assert not load["torch_imported"]
    resident = load["resident"]
    assert resident["generated_tokens"] == 64
    if sys.platform == "linux":
        for when in ("loaded", "generated"):
            for memory in resident[when].values():
                assert 0 < memory["added_bytes"] < memory["total_bytes"] < 1e9
        assert resident["generated"]["anonymous"]["total_bytes"] >= resident["loaded"]["anonymous"]["total_bytes"]


@in_one_process
def test_generation_is_measured_at_the_first_context(document: dict[str, Any]) -> None:
    generation = document["generation"]
    assert (generation["context"], generation["acceptance"], generation["same_tokens"]) == (20, 0.7, True)
    computed = next(row for row in document["speedup"] if row["acceptance"] == 0.7)
    assert {row["num_draft_tokens"] for row in generation["speculative"]} == {4, computed["best_num_draft_tokens"]}
    for row in generation["speculative"]:
        assert row["expected_times_faster"] == computed["by_num_draft_tokens"][row["num_draft_tokens"] - 1]
        assert 1 <= row["tokens_per_round"] <= row["num_draft_tokens"] + 1
    check_same_text(document)
    with pytest.raises(CheckError, match=r"speculative tokens differ"):
        check_same_text({"generation": {**generation, "same_tokens": False}})


@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
def test_forced_acceptance_is_the_scheduled_one(engine: ForcedEngine, acceptance: float) -> None:
    prompt = random_ids(engine.manifest, 30)
    generation = forced_generation(engine, prompt, 128, acceptance, [4], seconds=0.0)
    (row,) = generation["speculative"]
    assert generation["same_tokens"]
    assert row["tokens_per_round"] == pytest.approx(row["expected_tokens_per_round"], rel=0.15)
    engine.scheduled, stats = 0, Stats()
    assert list(generate(engine, prompt, Options(128, 4), stats)) == engine.answer
    assert stats.accepted == engine.scheduled
    assert stats.acceptance_rate == {0.0: 0.0, 1.0: 1.0}.get(acceptance, stats.acceptance_rate)


def test_forced_engine_runs_the_drafter(engine: ForcedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    real = engine.draft_step
    monkeypatch.setattr(engine, "draft_step", lambda *step: (steps.append(step), real(*step))[1])
    stats = Stats()
    engine.answer = list(generate(engine, [3, 4, 5], Options(12), Stats()))
    engine.acceptance = 1.0
    assert list(generate(engine, [3, 4, 5], Options(12, 4), stats)) == engine.answer
    assert len(steps) == stats.drafted == stats.accepted > 4


def test_a_prompt_in_the_cache_is_not_run_again(engine: ForcedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = engine.run_target
    monkeypatch.setattr(engine, "run_target", lambda tokens, rows: (passes.append(tokens), real(tokens, rows))[1])
    first = list(generate(engine, [3, 4, 5], Options(6), Stats()))
    again = list(generate(engine, [3, 4, 5], Options(6), Stats()))
    assert (again, passes.count([3, 4, 5])) == (first, 1)
    list(generate(engine, [3, 4, 6], Options(6), Stats()))
    assert list(generate(engine, [3, 4, 5], Options(6), Stats())) == first
    engine.cache.window_start += 1  # as if rows had moved since
    assert list(generate(engine, [3, 4, 5], Options(6), Stats())) == first
    assert passes.count([3, 4, 5]) == 3


def test_contexts_that_do_not_fit_are_left_out(bundle: Bundle) -> None:
    path = bundle("e2b")
    manifest = replace(read_manifest(path), max_seq_len=300)  # up to 8 drafts
    warnings: list[str] = []
    assert fitting_contexts(path, manifest, (100, 259, 260, 100), warnings.append) == [100, 259]
    assert [re.sub(r".*: context", "context", line) for line in warnings] == [
        f"context 260, {path} has 300 positions, room for at most 259 before those that are timed"
    ]
    assert fitting_contexts(path, manifest, (), warnings.append) == [259]
    assert warnings[1].endswith("; 259 is timed instead")
    assert fitting_contexts(path, replace(manifest, max_seq_len=9999), (), warnings.append) == [512, 4096]
    assert len(warnings) == 2
    with pytest.raises(InputError, match=r"--context 260 is too long: .* at most 259 .*; export with a larger"):
        fitting_contexts(path, manifest, (260,), warnings.append)
    with pytest.raises(InputError, match=r"room for at most 0 "):
        fitting_contexts(path, replace(manifest, max_seq_len=40), (), warnings.append)


@in_one_process
def test_tables(document: dict[str, Any]) -> None:
    titles = [str(table.title) for table in bench_tables(document)]
    assert len(titles) == 4
    without = {**document, "speedup": [{**row, "by_num_draft_tokens": []} for row in document["speedup"]]}
    without["generation"] = {**document["generation"], "speculative": []}
    without["decode_weights"] = {"bytes": None, "derived_from": "nothing"}
    assert len(bench_tables(without)) == 3


def test_command(run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("exporter.cli.bench_command.BenchOptions", lambda *chosen: BenchOptions(*chosen, seconds=0.05))
    options = ("--threads", 1, "--context", 20, "--context", 590, "--acceptance", 1)
    code, out, err = run("bench", bundle("e2b"), *options, "--json")
    document = json.loads(out)
    assert (code, [row["acceptance"] for row in document["speedup"]]) == (0, [1.0])
    assert err.startswith("left out: context 590")
    assert len(err.splitlines()) == 1
    monkeypatch.setattr("exporter.cli.bench_command.measure_bundle", lambda *_: document)
    code, out, _ = run("bench", bundle("e2b"), *options)
    assert code == 0
    assert "draft step" in out
    document["generation"]["same_tokens"] = False
    code, out, err = run("bench", bundle("e2b"), *options)
    assert (code, "NO" in out) == (1, True)
    assert err.startswith("failed: bench: speculative tokens differ")
    monkeypatch.undo()
    for arguments, message in (
        ((tmp_path,), "not a bundle"),
        ((bundle("e2b"), "--context", 590), "--context 590 is too long"),
        ((bundle("e2b"), "--threads", 0), "--threads"),
    ):
        code, out, err = run("bench", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert message in err
