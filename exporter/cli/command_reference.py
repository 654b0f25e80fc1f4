"""Write docs/cli.md, the reference of all commands, from the commands: `python -m exporter.cli.command_reference`."""

import re
from collections.abc import Iterable, Iterator, Sequence

import click

from exporter.cli.main import COMMANDS, cli
from exporter.cli.options import ARGUMENTS, DraftTokens

PROGRAM = "gemma-mtp-export"

EXIT_CODES = (
    ("0", "fine"),
    ("1", "a check failed, or `doctor` has a finding"),
    ("2", "bad input or usage; a line on standard error says what is wrong and what to do"),
    ("70", "an error that nobody foresaw, a fault of this program; `--traceback` prints where it happened"),
    ("130", "interrupted, by Ctrl-C"),
    ("141", "the reader of standard output or standard error ended, such as `head`"),
    ("143", "terminated, by SIGTERM"),
)


def render_reference() -> str:
    """Return the text of docs/cli.md: what `--help` shows of all commands, as Markdown.

    It depends on the commands only, not on the width of the terminal.
    """
    contexts = command_contexts()
    lines = [*_introduction(contexts)]
    for name, context in contexts.items():
        lines += _section(name, context)
    return "\n".join(lines)


def command_contexts() -> dict[str, click.Context]:
    """Import all commands, and return a context for each by its name, in the order of `COMMANDS`."""
    group = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    commands = {name: cli.get_command(group, name) for name in COMMANDS}
    return {name: click.Context(command, group, name) for name, command in commands.items() if command}


def _introduction(contexts: dict[str, click.Context]) -> Iterator[str]:
    yield from ("# Commands", "")
    yield from (
        "<!-- `make docs` writes this page from the commands in exporter/cli; change those, not this page. -->",
        "",
    )
    yield from _paragraphs(cli.help or "")
    yield from _code(f"{PROGRAM} COMMAND [OPTIONS] [ARGUMENT]")
    yield from _table(("command", "summary"), ((f"[`{name}`](#{name})", COMMANDS[name]) for name in contexts))
    yield from (f"`{PROGRAM} --version` prints the version; `-h` or `--help` after a command prints its help.", "")
    yield from ("## Exit codes", "")
    yield from _table(("code", "meaning"), EXIT_CODES)
    yield from ("## JSON", "")
    without = [f"`{name}`" for name, context in contexts.items() if not _has_json(context.command)]
    yield (
        f"All commands except {_enumerate(without, 'and')} have the option `--json`. With it, a command prints one JSON"
        " document on standard output and nothing else; messages go to standard error. A command whose check failed"
        " prints its document as well. Each document has a `schema_version`, and [a JSON Schema](schemas/);"
        " [support](support.md#documents-of---json) says what a version keeps."
    )
    yield ""


def _section(name: str, context: click.Context) -> Iterator[str]:
    command = context.command
    yield from (f"## {name}", "")
    yield from _code(" ".join([PROGRAM, name, *command.collect_usage_pieces(context)]))
    yield from _paragraphs(command.help or "")
    yield from _table(("name", "type", "default", "description"), (_row(param, context) for param in command.params))


def _row(param: click.Parameter, context: click.Context) -> tuple[str, str, str, str]:
    name = param.name or ""
    if not isinstance(param, click.Option):
        return f"`{name.upper()}`", _type(param), "required", ARGUMENTS[name]
    if param.required:
        default = "required"
    elif isinstance(param.show_default, str):
        default = param.show_default
    else:
        value = param.get_help_extra(context).get("default")
        default = f"`{value}`" if value else ""
    names = ", ".join(f"`{option}`" for option in (*param.opts, *param.secondary_opts))
    return names, _type(param), default, _quote_options(param.help or "")


def _type(param: click.Parameter) -> str:
    """What values a parameter takes, in words."""
    values = param.type
    if isinstance(param, click.Option) and param.is_flag:
        return "flag"
    if isinstance(values, DraftTokens):
        return "`auto` or integer, at least 0"
    if isinstance(values, click.Choice):
        return _enumerate([f"`{choice}`" for choice in values.choices], "or")
    if isinstance(values, click.IntRange | click.FloatRange):
        noun = "integer" if isinstance(values, click.IntRange) else "number"
        if values.max is None:
            return f"{noun}, at least {values.min}"
        return f"{noun}, {f'above {values.min}, at most' if values.min_open else f'{values.min} to'} {values.max}"
    return values.name


def _has_json(command: click.Command) -> bool:
    return any("--json" in param.opts for param in command.params)


def _enumerate(words: Sequence[str], conjunction: str) -> str:
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (_quote_options(" ".join(paragraph.split())), "")


def _quote_options(text: str) -> str:
    """Put backticks around options that have none: some renderers turn two hyphens into a dash."""
    return re.sub(r"`[^`]*`|--[a-z][a-z-]*", lambda match: f"`{match[0].strip('`')}`", text)


def _code(line: str) -> Iterator[str]:
    yield from ("```", line, "```", "")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


if __name__ == "__main__":
    print(render_reference(), end="")
