"""Bundles of every released format still give the tokens that they gave when they were made."""

import json
import shutil
from pathlib import Path

import pytest

from runtime_ref.manifest import FORMAT_VERSION, read_manifest
from tests.golden.make_golden import GOLDEN, TEXTS, written

FORMATS = sorted(path.name for path in GOLDEN.glob("format*"))


def test_every_format_has_its_bundles() -> None:
    assert [f"format{version}" for version in range(2, FORMAT_VERSION + 1)] == FORMATS


@pytest.mark.parametrize("backend", ["onnx", pytest.param("executorch", id="on executorch")])
@pytest.mark.parametrize("version", FORMATS)
def test_golden_bundle_gives_its_tokens(version: str, backend: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(GOLDEN / version / backend, tmp_path / backend))  # costs are saved beside it
    assert f"format{read_manifest(bundle).format_version}" == version
    expected = json.loads((GOLDEN / version / TEXTS).read_text(encoding="utf-8"))
    for drafts in (0, 4, None):
        for result, text in zip(written(bundle, drafts), expected, strict=True):
            assert result == {key: text[key] for key in result}, text
