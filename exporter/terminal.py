"""Standard output and standard error of every command: consoles, progress bars, exit codes."""

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from runtime_ref.errors import CheckError, InputError

# No markup: paths and token texts may have brackets.
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
out = Console(markup=False, highlight=False)


def run_command(command: click.Command) -> None:
    """Run a command; unusable input ends in one line and exit 2, a failed check in exit 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stopped export cleans up after itself
    try:
        command.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"error: {error.filename or 'output'}: {error.strerror or error}", err=True)
        sys.exit(2)
    except CheckError as error:
        click.echo(f"failed: {error}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def peak_bytes() -> int:
    """Most memory that this process was resident in so far, files that it mapped included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error; the block calls what it yields with a step's name and its share of the total."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda step, amount: progress.update(task, advance=amount, description=f"{title}: {step}")
