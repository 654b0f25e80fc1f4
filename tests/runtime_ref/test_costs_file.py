"""Measured costs are a cache: what is damaged does not count, and decoders that share the file lose nothing."""

import json
import multiprocessing
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime_ref.costs import Costs, costs_file, load_costs, save_costs
from runtime_ref.manifest import MANIFEST
from runtime_ref.streaming import open_decoder

SIZES = (0, 1, 2, 4, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory with a manifest; costs need no more of a bundle."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST).write_text("{}")
    return tmp_path / "bundle"


def measured(drafts: int, seconds: float) -> Costs:
    costs = Costs(8)
    costs.record(drafts, seconds, seconds if drafts == 8 else None)
    return costs


def test_costs_lie_beside_the_bundle(path: Path) -> None:
    save_costs(measured(8, 0.1), path, threads=1)
    assert costs_file(path) == path.with_name("bundle.device") / "costs.json"
    assert sorted(file.name for file in path.parent.iterdir()) == ["bundle", "bundle.device"]
    assert load_costs(path, 1, 8).step_seconds == pytest.approx(0.1 / 8)
    assert load_costs(path, 2, 8).step_seconds is None  # other threads, other costs
    assert platform.node() not in costs_file(path).read_text() or not platform.node()
    (path / MANIFEST).write_text('{"other": 1}')
    assert load_costs(path, 1, 8).step_seconds is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "3", '{"of": {}, "verify_seconds": {}, "draft_step_seconds": null}', "\0" * 300),
        *('{"version": 2}', '{"version": 2, "bundle": 1, "devices": []}'),
    ],
)
def test_a_damaged_or_older_file_does_not_count(content: str, path: Path) -> None:
    costs_file(path).parent.mkdir()
    costs_file(path).write_text(content)
    assert load_costs(path, 1, 8).as_dict() == Costs(8).as_dict()
    save_costs(measured(8, 0.1), path, 1)
    assert load_costs(path, 1, 8).step_seconds is not None


@pytest.mark.parametrize("value", [-1, 0, None, "x", 1e400, [], {}])
def test_impossible_costs_do_not_count(value: object, path: Path) -> None:
    save_costs(measured(8, 0.1), path, 1)
    document = json.loads(costs_file(path).read_text())
    for costs in document["devices"].values():
        costs["verify_seconds"] = {"1": value}
    costs_file(path).write_text(json.dumps(document))
    assert load_costs(path, 1, 8).as_dict() == Costs(8).as_dict()


def test_a_bundle_opens_whatever_the_file_holds(bundle: Callable[[str], Path]) -> None:
    costs_file(bundle("tiny")).parent.mkdir(exist_ok=True)
    costs_file(bundle("tiny")).write_text("")
    decoder = open_decoder(bundle("tiny"), 1)
    assert len([*decoder.stream([3, 4], max_new_tokens=3)]) == 3
    assert json.loads(costs_file(bundle("tiny")).read_text())["devices"]


def _save_often(path: Path, drafts: int) -> None:
    for _ in range(20):
        save_costs(measured(drafts, 0.1), path, threads=1)
        save_costs(measured(drafts, 0.2), path, threads=drafts + 2)


@pytest.mark.parametrize("kind", [threading.Thread, multiprocessing.get_context("spawn").Process])
def test_decoders_that_share_the_file_lose_nothing(kind: Callable, path: Path) -> None:
    """Each saves the cost of one size, in turns with costs of its own number of threads."""
    savers = [kind(target=_save_often, args=(path, drafts)) for drafts in SIZES]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert sorted(load_costs(path, 1, 8).as_dict()["verify_seconds"], key=int) == [str(k + 1) for k in SIZES]
    for drafts in SIZES:
        assert [*load_costs(path, drafts + 2, 8).as_dict()["verify_seconds"]] == [str(drafts + 1)]
    assert [file.name for file in costs_file(path).parent.iterdir()] == ["costs.json"]
