"""Kotlin refuses manifests that runtime_ref or the JSON Schema refuses, and accepts what runtime_ref accepts.

Run by `make android-test`, which builds the app's core. FUZZ_EXAMPLES sets the number of manifests of each format.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
from runs import BUILD

from exporter.cli.schemas import schemas
from runtime_ref.errors import InputError
from runtime_ref.manifest import FORMAT_VERSION, MANIFEST, read_manifest
from tests.edges import examples, spoilt
from tests.golden.make_golden import GOLDEN

COUNT = int(os.environ.get("FUZZ_EXAMPLES", "1000"))


@pytest.mark.parametrize("version", range(2, FORMAT_VERSION + 1))
def test_both_readers_agree(version: int, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(GOLDEN / f"format{version}" / "onnx", tmp_path / "bundle"))
    documents = examples(spoilt(json.loads((bundle / MANIFEST).read_text())), COUNT)
    lines = [json.dumps(document) for document in documents]
    # NaN and Infinity are no JSON: each reader takes them as its library does.
    is_json = [not re.search(r"\b(NaN|Infinity)\b", line) for line in lines]
    documents, lines = ([*itertools.compress(values, is_json)] for values in (documents, lines))
    (tmp_path / "lines").write_text("\n".join(lines))
    done = subprocess.run(
        ["bash", BUILD / "manifests", bundle, tmp_path / "lines"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kotlin = done.stdout.splitlines()
    assert len(kotlin) == len(lines)
    validator = jsonschema.Draft202012Validator(schemas()[f"manifest-{FORMAT_VERSION}.schema.json"])
    accepted = 0
    for document, line, answer in zip(documents, lines, kotlin, strict=True):
        (bundle / MANIFEST).write_text(line)
        try:
            read_manifest(bundle)
            python = "accepted"
        except InputError as error:
            python = str(error)
        assert (answer == "accepted") == (python == "accepted"), (line, answer, python)
        if version == FORMAT_VERSION and not validator.is_valid(document):
            assert answer != "accepted", line
        accepted += python == "accepted"
    assert 0 < accepted < len(lines)
