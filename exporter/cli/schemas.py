"""Write docs/schemas/, JSON Schemas of the manifest and of `--json` documents: `python -m exporter.cli.schemas DIR`."""

import json
import sys
from pathlib import Path
from typing import Any

from exporter.cli.json_documents import DOCUMENTS, LISTS, document_forms
from exporter.terminal import SCHEMA_VERSIONS
from runtime_ref.manifest import FORMAT_VERSION
from runtime_ref.manifest_form import (
    BESIDE_PLACES,
    FORM_3,
    MAX_COUNT,
    MAX_NUMBER,
    MAX_SIZE,
    REPETITION_RANGE,
    VERSION,
    Form,
    beside,
    count,
    number,
    penalty,
    size,
    two_ids,
    two_texts,
    version,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_COUNT = {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_COUNT}
# Schemas of the forms that are types or functions.
_VALUES: dict[Form, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    object: {},  # any value
    size: {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_SIZE},
    penalty: {"type": "number", "minimum": REPETITION_RANGE[0], "maximum": REPETITION_RANGE[1]},
    version: {"type": "string", "pattern": f"^{VERSION}$"},
    beside: {"enum": list(BESIDE_PLACES)},
    two_ids: {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 2},
    two_texts: {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
    count: _COUNT,
    number: {"type": "number", "exclusiveMinimum": -MAX_NUMBER, "exclusiveMaximum": MAX_NUMBER},
}


def form_schema(form: Form, strict: bool = False) -> dict[str, Any]:
    """Return the JSON Schema of a form, as `runtime_ref.manifest_form` explains forms.

    Args:
        form: what a value must be like.
        strict: whether objects may have no other keys.
    """
    if isinstance(form, dict):
        named = {key: inner for key, inner in form.items() if key != "*"}
        properties = {key.removesuffix("?"): form_schema(inner, strict) for key, inner in named.items()}
        required = [key for key in named if not key.endswith("?")]
        schema: dict[str, Any] = {"type": "object"}
        if named:
            schema |= {"properties": properties, "required": required}
        if "*" in form:
            schema["additionalProperties"] = form_schema(form["*"], strict)
        elif strict:
            schema["additionalProperties"] = False
        return schema
    if isinstance(form, list):
        return {"type": "array", "items": form_schema(form[0], strict)}
    if isinstance(form, tuple):
        return {"anyOf": [{"type": "null"}, form_schema(form[1], strict)]}
    return _VALUES[form]


def schemas() -> dict[str, dict[str, Any]]:
    """Return all schemas by the names of their files."""
    manifest = {**form_schema(FORM_3), "title": f"manifest.json of a bundle, format {FORMAT_VERSION}"}
    manifest["properties"]["format_version"] = {"const": FORMAT_VERSION}
    manifest["description"] = "FORMAT.md says what each key means, and what must hold between them."
    result = {f"manifest-{FORMAT_VERSION}.schema.json": {"$schema": DIALECT, **manifest}}
    for command in DOCUMENTS:
        version = SCHEMA_VERSIONS[command]
        result[f"{command}-{version}.schema.json"] = {
            "$schema": DIALECT,
            "title": f"What `{command}` prints with `--json`, version {version}",
            **document_schema(command),
        }
    return result


def document_schema(command: str, strict: bool = False) -> dict[str, Any]:
    """Return the schema of a command's document.

    Args:
        command: its name.
        strict: whether objects may have no other keys, apart from those that forms leave open.
    """
    alternatives = [form_schema(form, strict) for form in document_forms(command)]
    for alternative in alternatives:
        alternative["properties"]["schema_version"] = {"const": SCHEMA_VERSIONS[command]}
    if command in LISTS:
        alternatives.append({"type": "array", "items": alternatives[0]})
    return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}


def main() -> None:
    """Write every schema to the directory that the command line names."""
    (directory,) = map(Path, sys.argv[1:])
    directory.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        (directory / name).write_text(schema_text(schema), encoding="utf-8")


def schema_text(schema: dict[str, Any]) -> str:
    """Return a schema as its file holds it."""
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    main()
