"""What a checkpoint's directory tells about its origin."""

import json
from pathlib import Path

import pytest

from exporter.checkpoint.origin import model_origin

REVISION = "0123456789abcdef0123456789abcdef01234567"
CARD = '---\nlibrary_name: transformers\nlicense: "gemma"\ntags:\n- license: other\n---\nlicense: none\n'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_bare_directory_tells_nothing(checkpoint: Path) -> None:
    assert model_origin(checkpoint) == {}


def test_a_download_tells_its_revision_and_its_licence(checkpoint: Path) -> None:
    records = checkpoint / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    (records / "config.json.metadata").write_text(f"{REVISION}\netag\n1.0\n")
    (checkpoint / "README.md").write_text(CARD)
    assert model_origin(checkpoint) == {"revision": REVISION, "license": "gemma"}


def test_a_cached_snapshot_tells_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--gemma-4-E2B-it" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert model_origin(snapshot) == {"id": "google/gemma-4-E2B-it", "revision": REVISION}


def test_the_model_that_a_fine_tune_began_from_is_not_its_id(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"_name_or_path": "google/gemma-4-E2B-it"}))
    assert model_origin(checkpoint) == {}


@pytest.mark.parametrize("card", ["", "license: gemma\n", "---\nlicense: gemma\n", "---\nlicense:\n- gemma\n---\n"])
def test_a_card_without_a_plain_licence_tells_none(card: str, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text(card)
    assert model_origin(checkpoint) == {}
    (checkpoint / "README.md").write_bytes(b"\xff\xfe")
    assert model_origin(checkpoint) == {}
