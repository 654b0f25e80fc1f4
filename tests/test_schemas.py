"""The JSON Schemas in docs/schemas: they are those of the forms, real manifests fulfil them, readers are as strict."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter.cli.main import COMMANDS
from exporter.cli.schemas import schema_text, schemas
from exporter.terminal import SCHEMA_VERSIONS
from runtime_ref import manifest
from runtime_ref.errors import InputError
from runtime_ref.manifest import FORMAT_VERSION, MANIFEST, read_manifest
from tests.edges import examples, spoilt
from tests.golden.make_golden import GOLDEN
from tests.handmade import FEATURES, handmade

DIRECTORY = Path(__file__).parents[1] / "docs" / "schemas"
MANIFEST_SCHEMA = schemas()[f"manifest-{FORMAT_VERSION}.schema.json"]
MUTATIONS = int(os.environ.get("FUZZ_EXAMPLES", "150"))


def test_files_are_those_of_the_forms() -> None:
    found = {file.name: file.read_text(encoding="utf-8") for file in DIRECTORY.glob("*.json")}
    assert found == {name: schema_text(schema) for name, schema in schemas().items()}, "run `make docs`"


@pytest.mark.parametrize("name", schemas())
def test_schemas_are_valid(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas()[name])


def test_every_command_with_json_has_a_schema() -> None:
    assert SCHEMA_VERSIONS.keys() - {"synthetic"} == COMMANDS.keys() - {"demo"}


@pytest.mark.parametrize(("name", "recipe"), [("demo", "fp32"), ("demo", "int4"), ("dense", "fp32"), ("e2b", "int8")])
def test_manifests_of_exports_fulfil_the_schema(name: str, recipe: str, bundle: Callable[..., Path]) -> None:
    jsonschema.validate(json.loads((bundle(name, recipe=recipe) / MANIFEST).read_text()), MANIFEST_SCHEMA)


@pytest.mark.parametrize("feature", FEATURES)
def test_manifests_with_features_fulfil_the_schema(feature: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(bundle("e2b"), tmp_path / "made", FEATURES[feature][0])
    jsonschema.validate(json.loads((made / MANIFEST).read_text()), MANIFEST_SCHEMA)


def accepts(document: dict[str, Any]) -> bool:
    try:
        manifest._read(Path("b") / MANIFEST, document, "")
    except InputError:
        return False
    return True


def test_what_the_schema_refuses_readers_refuse() -> None:
    """And they accept some of what it accepts."""
    validator = jsonschema.Draft202012Validator(MANIFEST_SCHEMA)
    document = json.loads((GOLDEN / f"format{FORMAT_VERSION}" / "onnx" / MANIFEST).read_text())
    verdicts = []
    for mutated in examples(spoilt(document), MUTATIONS):
        verdicts.append((validator.is_valid(mutated), accepts(mutated)))
        assert verdicts[-1] != (False, True), mutated
    assert {*verdicts} == {(True, True), (True, False), (False, False)}


@pytest.mark.parametrize("version", range(2, FORMAT_VERSION + 1))
def test_spoilt_manifests_end_in_one_line(version: int) -> None:
    """Of every format: they are accepted, or refused without a traceback."""
    document = json.loads((GOLDEN / f"format{version}" / "onnx" / MANIFEST).read_text())
    assert {accepts(mutated) for mutated in examples(spoilt(document), MUTATIONS)} == {True, False}


def test_the_example_is_whole() -> None:
    """FORMAT.md names it as an example of a manifest."""
    assert read_manifest(GOLDEN / f"format{FORMAT_VERSION}" / "onnx").format_version == FORMAT_VERSION
