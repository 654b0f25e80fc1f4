"""Arguments and options that several commands share."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from exporter.graphs.backend import BACKENDS
from exporter.quantization.recipes import AUTO, RECIPES, Recipe, read_recipe
from runtime_ref.engine import MAX_THREADS
from runtime_ref.errors import InputError

PATH = click.Path(path_type=Path)
OR_ID = "or its id on the Hugging Face Hub (`OWNER/NAME`, `OWNER/NAME@REVISION`)"  # of a checkpoint

# Descriptions of positional arguments, for the reference of commands. Usage messages show their names only.
ARGUMENTS = {
    "bundle": "Bundle directory.",
    "path": "Directory of a bundle, a target's checkpoint or a drafter's checkpoint; or a session's file.",
}

Decorator = Callable[[Callable], Callable]


class DraftTokens(click.ParamType):
    """The type of `--num-draft-tokens`: `auto`, which is converted to None, or a number."""

    name = "auto|K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Convert a value from the command line; anything but `auto` or 1 to 9 digits is a usage error."""
        if value is None or value == "auto":
            return None
        if not str(value).isdecimal() or len(str(value)) > 9:
            self.fail(f"{value!r} is not a number of draft tokens; expected 'auto', or 0 or more", param, ctx)
        return int(value)


class Number(click.FloatRange):
    """A number in a range, in which click alone takes `nan` to be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert a value from the command line; `nan` is a usage error, as is one beyond the range."""
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is not a number", param, ctx) if math.isnan(number) else number


class Bytes(click.ParamType):
    """A number of bytes, at least 1, that may be written as `1.5e9`."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert a value from the command line; anything but a number of 1 or more is a usage error."""
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if 1 <= number < 2**62:
            return int(number)
        return self.fail(f"{value!r} is not a number of bytes; expected one such as 1.5e9, below 4e18", param, ctx)


class RecipeType(click.ParamType):
    """The type of `--recipe`: `auto`, which is converted to None, the name of a recipe, or a file."""

    name = "|".join((AUTO, *RECIPES, "FILE"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Recipe | None:
        """Convert a value from the command line; anything but a name or a file of rules is an error."""
        if value is None or value == AUTO:
            return None
        if value in RECIPES:
            return RECIPES[value]
        if not Path(value).exists():
            self.fail(f"{value!r} is neither a file nor one of {', '.join((AUTO, *RECIPES))}", param, ctx)
        return read_recipe(Path(value))


BYTES = Bytes()
RECIPE = RecipeType()
bundle_argument = click.argument("bundle", type=PATH)
backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="onnx", help="Runtime that the bundle is for."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), help="Threads of the runtime.", show_default="one for each CPU"
)
clusters_option = click.option(
    "--clusters",
    type=click.IntRange(1),
    help="Number of clusters to make.",
    show_default="by the size of the vocabulary: 2048 for 262144 tokens",
)
top_k_option = click.option(
    "--top-k-clusters",
    type=click.IntRange(1),
    help="Number of clusters that the first stage keeps.",
    show_default="the checkpoint's; for new clusters, by their recall",
)


adapter_option = click.option(
    "--adapter",
    "adapters",
    type=PATH,
    multiple=True,
    help=f"Directory of a LoRA adapter (PEFT), {OR_ID}, that is merged into the target; several are merged in order.",
)


def source_options(required: bool) -> Decorator:
    """Return a decorator that adds `--target`, `--drafter` and `--adapter`: what a bundle was exported from.

    Args:
        required: whether the options are required.
    """
    target, drafter = ("", "") if required else ("; needs --drafter", "; needs --target")

    def decorate(command: Callable) -> Callable:
        command = adapter_option(command)
        command = click.option(
            "--drafter",
            type=PATH,
            required=required,
            help=f"Checkpoint directory of the drafter that was exported, or its id{drafter}.",
        )(command)
        return click.option(
            "--target",
            type=PATH,
            required=required,
            help=f"Checkpoint directory of the target that was exported, {OR_ID}{target}.",
        )(command)

    return decorate


def calibration_options(command: Callable) -> Callable:
    """Add `--calibrate/--no-calibrate` and `--calibration`, which are checked when the command is called."""

    @functools.wraps(command)
    def checked(calibrate: bool | None, calibration: Path | None, **others: Any) -> Any:
        if calibration is not None and calibrate is False:
            raise click.UsageError("--calibration has texts to calibrate on; leave out --no-calibrate")
        return command(calibrate=calibrate, calibration=calibration, **others)

    text = "Texts for that, like those of your users: a text file in UTF-8, or JSON as for --prompt-ids."
    default = "a set of this package, and what the target writes"
    option = click.option("--calibration", type=PATH, help=text, show_default=default)(checked)
    return click.option(
        "--calibrate/--no-calibrate",
        default=None,
        help="Round matrices of 4 bits by what they do to texts and even out inputs that runtimes round to 8 bits, or "
        "round each number to the nearest.",
        show_default="calibrate where rounded matrices lie on no grid",
    )(option)


def prompt_ids_option(default: str = "") -> Decorator:
    """Return a decorator that adds `--prompt-ids`: prompts as token ids, from a file.

    Args:
        default: prompts that are used without the option, for the help text; empty if there are none.
    """
    text = "JSON file with prompts: a list of token ids, or a list of such lists."
    return click.option("--prompt-ids", type=PATH, help=text, show_default=default or None)


def utf8_text(content: bytes, origin: str) -> str:
    """Return a text that a user gave, without a byte order mark.

    Args:
        content: its bytes.
        origin: what the error names, a path for instance.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{origin}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
