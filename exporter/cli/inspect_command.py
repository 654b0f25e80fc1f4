"""`inspect`: what a bundle or a checkpoint holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from exporter.bundle.inspection import inspect as inspect_path
from exporter.cli.options import PATH, json_option
from exporter.files import human_bytes
from exporter.terminal import out


def facts_table(facts: dict[str, Any]) -> Table:
    """Nested facts as rows of a dotted name and a value; bytes in human units."""
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)
    for name, value in _flatten("", facts):
        sized = name.startswith("files.") or name.endswith("_bytes")
        table.add_row(name, human_bytes(value) if sized else str(value))
    return table


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if prefix.endswith("_by_name"):
        yield prefix, ", ".join(f"{key} {count}" for key, count in value.items())
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


@click.command()
@click.argument("path", type=PATH)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds."""
    facts = inspect_path(path)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        out.print(facts_table(facts))
