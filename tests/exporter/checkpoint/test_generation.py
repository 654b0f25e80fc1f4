"""The settings in a checkpoint's generation_config.json, and that a bundle takes them over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.checkpoint.generation_config import default_sampling
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.special_tokens import special_tokens
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import open_decoder
from tests.conftest import Directories, Run
from tests.exports import MAX_SEQ_LEN


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint directory whose generation_config.json has the given settings."""

    def write(**settings: object) -> Path:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, Sampling(0.0)),
        ({"temperature": 0.7, "top_k": 20}, Sampling(0.0, top_k=20)),
        ({"do_sample": False, "temperature": 0.7}, Sampling(0.0)),
        ({"top_k": -2, "top_p": 7, "temperature": "x"}, Sampling(0.0)),  # greedy decoding reads none of these
        ({"do_sample": True, "top_k": -1}, Sampling(1.0)),
        ({"do_sample": True, "top_k": 10**400}, Sampling(1.0)),
        ({"do_sample": True}, Sampling(1.0, top_k=50)),
        ({"do_sample": True, "top_k": 65}, Sampling(1.0, top_k=64)),
        ({"do_sample": True, "top_k": 10**30}, Sampling(1.0, top_k=64)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}, Sampling(0.7, 0.9, top_k=20)),
        ({"do_sample": True, "temperature": None, "top_k": 0, "top_p": None}, Sampling(1.0)),
        ({"do_sample": True, "top_k": 64.0}, Sampling(1.0, top_k=64)),
    ],
)
def test_default_sampling(write_config: Callable[..., Path], settings: dict, sampling: Sampling) -> None:
    assert default_sampling(write_config(**settings)) == sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "top_k": -2}, r"top_k is -2, expected a whole number that is not negative"),
        ({"do_sample": True, "top_k": 2.5}, r"top_k is 2.5, expected a whole number"),
        ({"do_sample": True, "top_k": "many"}, r"top_k is 'many', expected a number"),
        ({"do_sample": True, "top_k": float("inf")}, r"expected a whole number"),
        ({"do_sample": True, "temperature": -1}, r"temperature is -1.0"),
        ({"do_sample": True, "top_p": 0.0}, r"top-p is 0.0"),
        ({"do_sample": "yes"}, r"do_sample is 'yes'"),
    ],
)
def test_impossible_values_are_refused(write_config: Callable[..., Path], settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        default_sampling(write_config(**settings))


def test_all_end_tokens_are_read(write_config: Callable[..., Path]) -> None:
    assert special_tokens(write_config(eos_token_id=[106, 1, 50, 1]))[0].eos == (1, 50, 106)


def test_a_bundle_samples_as_its_checkpoint_says(
    run: Run, pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    target, drafter = pair_dirs("dense")
    shutil.copytree(target, tmp_path / "target")
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "eos_token_id": [7, 9]}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(settings))
    output = tmp_path / "bundle"
    assert open_pair(tmp_path / "target", drafter).sampling == Sampling(1.3, 0.9, top_k=30)
    pair = ("--target", tmp_path / "target", "--drafter", drafter)
    code, _, err = run("export", *pair, "--output", output, "--recipe", "fp32", "--max-seq-len", MAX_SEQ_LEN)
    assert code == 0, err
    manifest = read_manifest(output)
    assert manifest.sampling == Sampling(1.3, 0.9, top_k=30)
    assert manifest.eos == {7, 9}
    decoder = open_decoder(output, threads=1)

    def ids(**options: object) -> list[int]:
        return [token.id for token in decoder.stream([3, 4, 5], max_new_tokens=12, **options)]  # type: ignore[arg-type]

    assert ids(seed=5) == ids(seed=5, temperature=1.3, top_k=30, top_p=0.9, num_draft_tokens=0)
    assert ids(seed=5) != ids(seed=6)
    assert ids(temperature=0.0) == ids(temperature=0.0, seed=9)
    (output / "manifest.json").write_text((output / "manifest.json").read_text().replace('"top_k": 30', '"top_k": 99'))
    code, _, err = run("generate", output, "--prompt", "a")
    assert (code, err.count("\n")) == (2, 1)
    assert "top-k is 99" in err
