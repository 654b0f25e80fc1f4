"""The doctor names faults of a pair: drafters trained for other inputs than they get, and damage by a recipe."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.checkpoint.pair import open_pair
from exporter.doctor import diagnosis
from tests.exporter.doctor.engines import HEAD, STATE, Pairs, findings, load_bundle
from tests.exports import export

STATE_RMS = 5.0  # root mean square of the built-in target's states before their norm, about


def unscaled(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Make a drafter for embeddings that are not scaled."""
    hidden_size = drafter["pre_projection.weight"].shape[1] // 2
    drafter["pre_projection.weight"][:, :hidden_size] *= hidden_size**0.5


def before_norm(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Make a drafter for states before the target's final norm: its projections include what the norm does."""
    hidden_size = drafter["pre_projection.weight"].shape[1] // 2
    target["model.language_model.layers.9.layer_scalar"] /= 64  # the norm undoes this
    factor = target["model.language_model.norm.weight"].float() * 64 / STATE_RMS
    drafter["pre_projection.weight"][:, hidden_size:] *= factor
    drafter["post_projection.weight"] /= factor.unsqueeze(1)


def shuffled(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Put tokens into clusters at random, so that centroids do not find them."""
    ordering = drafter["masked_embedding.token_ordering"]
    drafter["masked_embedding.token_ordering"] = ordering[
        torch.randperm(len(ordering), generator=torch.Generator().manual_seed(0))
    ]


def outliers(drafter: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Scale a few columns up and their inputs down: the same drafter until rounding leaves nothing of other columns."""
    for name in [name for name in drafter if name.endswith("input_layernorm.weight")]:
        drafter[name][:8] /= 512
        drafter[name.replace("input_layernorm", "self_attn.q_proj")][:, :8] *= 512
    for name in [name for name in drafter if name.endswith("pre_feedforward_layernorm.weight")]:
        drafter[name][:8] /= 512
        for part in ("gate_proj", "up_proj"):
            drafter[name.replace("pre_feedforward_layernorm", f"mlp.{part}")][:, :8] *= 512


@pytest.mark.parametrize(
    ("tamper", "recipe", "experiment", "detail"),
    [
        (unscaled, "fp32", "embedding scale", "if embeddings are not multiplied by sqrt(hidden size): the drafter was"),
        (before_norm, "fp32", STATE, "if the state comes before the target's final norm: the drafter was trained"),
        (shuffled, "fp32", HEAD, "with a dense head"),
        (outliers, "int8", "precision of the drafter", "with the drafter in fp32"),
    ],
)
def test_faults_of_the_pair(
    tamper: Callable[..., None],
    recipe: str,
    experiment: str,
    detail: str,
    pair_dirs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "SAMPLED_TEXTS", 8 if tamper is shuffled else 5)  # the others take longer
    target, drafter = (shutil.copytree(source, tmp_path / source.name) for source in pair_dirs("demo"))
    tensors, of_target = load_file(drafter / "model.safetensors"), load_file(target / "model.safetensors")
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    tamper(tensors, of_target)
    save_file(tensors, drafter / "model.safetensors", {"format": "pt"})
    save_file(of_target, target / "model.safetensors", {"format": "pt"})
    bundle = export(tmp_path / "bundle", target, drafter, "onnx", recipe)
    details = findings(load_bundle(bundle), open_pair(target, drafter), [[2]], 24)
    assert next(iter(details)) == experiment
    assert detail in details[experiment]
