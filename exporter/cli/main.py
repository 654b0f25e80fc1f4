"""The `gemma-mtp-export` command.

The module of a command is imported only when the command runs, and imports what is slow inside its functions.
"""

import importlib
from collections.abc import Mapping

import click

from exporter.terminal import run_command, traceback_option

# Names of commands, and the first sentences of their docstrings. Command NAME is the function `NAME` in the module
# `NAME_command` beside this file.
COMMANDS: Mapping[str, str] = {
    "demo": "Export the built-in pair, generate text with it, and check parity.",
    "export": "Export a target and its drafter into a bundle.",
    "generate": "Generate text with a bundle: continue a prompt, or chat.",
    "prefill": "Run a prompt once and save it as a session, which texts that begin with it go on from.",
    "parity": "Check a bundle: files, weights, outputs of the graphs, plain and speculative tokens.",
    "report": "Measure a bundle and write an HTML page about it: drafts, speed, memory, parity.",
    "doctor": "Find out why few drafts are accepted, with an experiment for each known cause.",
    "cluster": "Cluster a drafter's vocabulary for a two-stage head, and measure its recall.",
    "recipe": "Measure what bits cost each class of matrices, and choose widths for a number of bytes.",
    "bench": "Time a bundle on this machine: passes, draft steps, memory, speed-up by drafting.",
    "inspect": "Show what a bundle, a checkpoint or a session contains.",
}


class LazyGroup(click.Group):
    """A group that lists the names and summaries of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command with the options of all commands, or None for a name not in `COMMANDS`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"exporter.cli.{cmd_name}_command"), cmd_name)
        return command if any(param.name == "traceback" for param in command.params) else traceback_option(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for `--help`, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="gemma-mtp-export")
@traceback_option
def cli() -> None:
    """Export Gemma 4 E2B/E4B with its MTP drafter to phones, and check that nothing was lost."""


def main() -> None:
    """Run the command line as `exporter.terminal.run_command` does."""
    run_command(cli)


if __name__ == "__main__":
    main()
