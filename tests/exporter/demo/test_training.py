"""Training of the built-in pair: its sizes, what it saves, and that a step of it runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporter.checkpoint.config_json import read_drafter_config, read_target_config
from exporter.checkpoint.pair import open_pair
from exporter.demo import PAIR
from exporter.demo.sizes import drafter_json, target_json
from exporter.demo.training import checkpoints
from exporter.demo.training.learning import BFLOAT16, initialise, train_drafter
from exporter.demo.training.train import DRAFTER, TARGET
from exporter.modeling.target import Target

CONFIGS = json.loads(json.dumps({"target": target_json(TARGET), "drafter": drafter_json(DRAFTER)}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An output directory of training that has only the configs yet."""
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_sizes_are_those_of_the_built_in_pair() -> None:
    assert {name: json.loads((PAIR / name / "config.json").read_text()) for name in CONFIGS} == CONFIGS
    assert read_target_config(PAIR / "target") == TARGET
    assert read_drafter_config(PAIR / "drafter") == DRAFTER


def test_saved_pairs_are_checkpoints_and_load_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    target = Target(TARGET, BFLOAT16)
    initialise(target)
    checkpoints.round_to_bfloat16(target)
    checkpoints.save_target(target, directory / "target")
    assert_equal(state(checkpoints.load_target(directory / "target", BFLOAT16)), state(target))

    centroids = torch.zeros(DRAFTER.num_centroids, DRAFTER.text.hidden_size)
    monkeypatch.setattr(checkpoints, "train_centroids", lambda *_: centroids)
    drafter = checkpoints.new_drafter(directory / "drafter", target, BFLOAT16)
    checkpoints.round_to_bfloat16(drafter)
    checkpoints.save_drafter(drafter, target, torch.zeros(0), directory / "drafter")
    other = checkpoints.new_drafter(directory / "drafter", target, BFLOAT16)
    assert not torch.equal(other.pre_projection.weight, drafter.pre_projection.weight)
    checkpoints.load_drafter(other, directory / "drafter")
    assert_equal(state(other), state(drafter))
    pair = open_pair(directory / "target", directory / "drafter")
    assert pair.two_stage is not None
    assert (pair.two_stage.num_clusters, pair.two_stage.top_k_clusters) == (64, 8)


def test_a_step_trains_the_drafter_and_not_the_target(directory: Path) -> None:
    torch.manual_seed(0)
    target = Target(TARGET, BFLOAT16)
    initialise(target)
    drafter = checkpoints.new_drafter(directory / "drafter", target, BFLOAT16)
    before, target_before = state(drafter), state(target)
    batch = torch.randint(TARGET.vocab_size, (2, 24))
    with torch.enable_grad():
        train_drafter(drafter, target, iter([batch]), steps=1, rate=1e-3, sharpness=1.0)
    changed = {name for name, parameter in state(drafter).items() if not torch.equal(parameter, before[name])}
    assert "target_embed_tokens.weight" not in changed
    assert {"pre_projection.weight", "head.weight", "layers.0.self_attn.q_proj.weight"} <= changed
    assert_equal(state(target), target_before)
