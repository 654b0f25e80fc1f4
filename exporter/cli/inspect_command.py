"""The command `inspect`, which shows what a bundle, a checkpoint or a session contains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from exporter.bundle.inspection import inspect as inspect_path
from exporter.cli.options import PATH, json_option
from exporter.files import human_bytes
from exporter.quantization.widths import Width
from exporter.terminal import out, print_json


def contents_table(contents: dict[str, Any]) -> Table:
    """Return a table with a row for each value of a nested document: its dotted name and the value.

    Args:
        contents: the document of `exporter.bundle.inspection.inspect`. Numbers of bytes are shown in human units.
    """
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)
    for name, value in _flatten("", contents):
        in_bytes = name.startswith("files.") or name.endswith("_bytes")
        table.add_row(name, human_bytes(value) if in_bytes else str(value))
    return table


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if prefix == "widths":
        for entry in value:
            yield f"widths.{Width(entry['bits'], entry['group_size'])}", "\n".join(entry["matrices"])
    elif prefix.endswith("_by_name"):
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
    """Show what a bundle, a checkpoint or a session contains.

    PATH is a bundle, a target's checkpoint or a drafter's checkpoint, the id of one on the Hugging Face Hub, or a
    session's file, whose context has room for so many `tokens_left`. For ExecuTorch bundles it also shows which
    operations and weights are delegated to XNNPACK.
    """
    if not path.exists():
        from exporter.checkpoint.hub import local_checkpoint

        path = local_checkpoint(path)
    contents = inspect_path(path)
    if as_json:
        print_json("inspect", contents)
    else:
        out.print(contents_table(contents))
