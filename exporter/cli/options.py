"""Arguments and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)

Decorator = Callable[[Callable], Callable]


class DraftTokens(click.ParamType):
    """The value of `--num-draft-tokens`: `auto`, converted to None, or a count."""

    name = "auto|K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Convert a value from the command line; anything but `auto` or up to 9 digits is a usage error."""
        if value is None or value == "auto":
            return None
        if not str(value).isdecimal() or len(str(value)) > 9:
            self.fail(f"{value!r} is neither 'auto' nor a count", param, ctx)
        return int(value)


bundle_argument = click.argument("bundle", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Threads inside an operation.  [default: one for each CPU]"
)
clusters_option = click.option(
    "--clusters", type=click.IntRange(1), help="Number of clusters to make.  [default: 2048 for Gemma's 262144 tokens]"
)
top_k_option = click.option(
    "--top-k-clusters",
    type=click.IntRange(1),
    help="Clusters that the first stage keeps.  [default: as the checkpoint says, or by recall]",
)


def source_options(required: bool) -> Decorator:
    """`--target` and `--drafter`: the checkpoints that a bundle was exported from."""
    target, drafter = ("", "") if required else ("; needs --drafter", "; needs --target")

    def decorate(command: Callable) -> Callable:
        command = click.option(
            "--drafter", type=PATH, required=required, help=f"The drafter it was exported from{drafter}."
        )(command)
        return click.option(
            "--target", type=PATH, required=required, help=f"The checkpoint it was exported from{target}."
        )(command)

    return decorate


def prompt_ids_option(default: str = "") -> Decorator:
    """`--prompt-ids`: prompts as token ids, from a file.

    Args:
        default: what is used without the option, for the help text; empty if there is nothing to say.
    """
    shown = f"  [default: {default}]" if default else ""
    text = f"JSON file: a list of token ids, or a list of such lists.{shown}"
    return click.option("--prompt-ids", type=PATH, help=text)
