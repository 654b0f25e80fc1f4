"""Options of `generate` that change logits before a token is chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from exporter.cli.options import PATH, Decorator, utf8_text
from runtime_ref.manifest_form import REPETITION_RANGE
from runtime_ref.rules import MAX_PENALTY

FROM_CHECKPOINT = "the checkpoint's"


class Bias(click.ParamType):
    """The type of `--logit-bias`: a token id and a number."""

    name = "ID=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Convert a value from the command line; anything but a token id, `=` and a number is a usage error."""
        token, _, bias = str(value).partition("=")
        try:
            if token.isdecimal() and len(token) <= 9:
                return int(token), float(bias)
        except ValueError:
            pass
        return self.fail(f"{value!r} is not a token id and a number; expected one such as 42=-1.5", param, ctx)


_OPTIONS: tuple[Decorator, ...] = (
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(*REPETITION_RANGE),
        show_default=FROM_CHECKPOINT,
        help="Divides positive logits of tokens of the prompt and the answer, and multiplies others; 1 is none.",
    ),
    click.option(
        "--presence-penalty",
        type=click.FloatRange(-MAX_PENALTY, MAX_PENALTY),
        default=0.0,
        help="Subtracted from the logits of tokens that are in the answer; 0 is none.",
    ),
    click.option(
        "--frequency-penalty",
        type=click.FloatRange(-MAX_PENALTY, MAX_PENALTY),
        default=0.0,
        help="Subtracted from a token's logit for each time that it is in the answer; 0 is none.",
    ),
    click.option(
        "--logit-bias",
        type=Bias(),
        multiple=True,
        help="Token id and what is added to its logit, -100 to 100; may be given several times.",
    ),
    click.option(
        "--suppress",
        type=click.IntRange(0),
        multiple=True,
        help="Id of a token that is never chosen; may be given several times.",
    ),
    click.option("--json-schema", type=PATH, help="File with a JSON Schema that the answer fulfils."),
    click.option("--regex", help="Regular expression that the whole answer matches."),
    click.option(
        "--thinking-budget", type=click.IntRange(0), help="Maximum number of tokens of thoughts; no maximum without it."
    ),
)


def rule_options(command: Callable) -> Callable:
    """Add the options; `rules_of` turns their values into those of `Decoder.stream`.

    Args:
        command: the function of a command.
    """
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def rules_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return options of `Decoder.stream`.

    Args:
        values: of the options here, by the names of their parameters.

    Raises:
        click.UsageError: a token has two biases.
        InputError: the file of a schema is not UTF-8.
    """
    schema: Path | None = values["json_schema"]
    biases = dict(values["logit_bias"])
    if len(biases) < len(values["logit_bias"]):
        raise click.UsageError("--logit-bias names a token twice")
    return values | {"logit_bias": biases, "json_schema": schema and utf8_text(schema.read_bytes(), str(schema))}
