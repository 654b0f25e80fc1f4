"""Arguments that commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DIRECTORY = click.Path(path_type=Path)


class DraftTokens(click.ParamType):
    """`auto`, read as None, or a count."""

    name = "auto|K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        if not str(value).isdecimal() or len(str(value)) > 9:
            self.fail(f"{value!r} is neither 'auto' nor a count", param, ctx)
        return int(value)


clusters_option = click.option(
    "--clusters",
    type=click.IntRange(1),
    help="How many to make.  [default: 2048 for Gemma's 262144 tokens]",
)
top_k_option = click.option(
    "--top-k-clusters",
    type=click.IntRange(1),
    help="Clusters that are kept.  [default: as the checkpoint says, or by recall]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def bench_options(command: Callable) -> Callable:
    """Those of `bench`."""
    for option in (
        click.option(
            "--acceptance",
            type=click.FloatRange(0, 1),
            help="Chance of a draft if those before it were accepted.  [default: 0.3 to 0.9; 0.7 for measured text]",
        ),
        click.option(
            "--context",
            "contexts",
            type=click.IntRange(1),
            multiple=True,
            help="Tokens before those that are timed; may be given more than once.  [default: 512 and 4096]",
        ),
        click.option(
            "--threads", type=click.IntRange(1), help="Threads inside an operation.  [default: one for each CPU]"
        ),
    ):
        command = option(command)
    return command
