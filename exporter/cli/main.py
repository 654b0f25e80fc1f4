"""The `gemma-mtp-export` command. A command's module is imported only when the command runs: torch takes seconds."""

import importlib
from collections.abc import Mapping

import click

from exporter.terminal import run_command

# Each command NAME is the function `NAME` of the module `NAME_command` beside this file.
COMMANDS: Mapping[str, str] = {
    "demo": "Export the built-in pair, generate text with it, and check parity.",
    "export": "Export a target and its drafter into a bundle.",
    "generate": "Continue prompts with a bundle; without a prompt, on a terminal, chat.",
    "parity": "Prove a bundle: files, weights, graphs against eager torch, plain and speculative tokens.",
    "report": "Measure a bundle and write one HTML page about it: drafts, speed, memory, parity.",
    "doctor": "Find out why few drafts are accepted: an experiment for each known cause.",
    "cluster": "Cluster a drafter's vocabulary, and show the recall of its best tokens against the work.",
    "bench": "Time a bundle: passes, drafts, memory, and what drafting gains at a given acceptance rate.",
    "inspect": "Show what a bundle or a checkpoint holds.",
}


class LazyGroup(click.Group):
    """A group that knows the names and summaries of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None for a name that is not in `COMMANDS`."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"exporter.cli.{cmd_name}_command"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands for `--help`, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="gemma-mtp-export")
def cli() -> None:
    """Export Gemma 4 E2B/E4B with its MTP drafter to phones, and prove that nothing was lost."""


def main() -> None:
    """Run the command line: exit 0, 1 for a failed check, 2 for unusable input, which is reported in one line."""
    run_command(cli)


if __name__ == "__main__":
    main()
