"""What all commands share on a terminal: consoles, progress bars and exit codes."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from runtime_ref.errors import CheckError, InputError

# No markup: rich would take brackets in paths and token texts for styles.
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
out = Console(markup=False, highlight=False)

# Modules that are not among the base dependencies, and the extra that installs each.
EXTRAS = {
    **dict.fromkeys(("executorch", "torchao"), "executorch"),
    **dict.fromkeys(("matplotlib", "onnx", "onnx_ir", "onnxscript", "safetensors", "sklearn", "torch"), "export"),
}


def run_command(command: click.Command) -> None:
    """Run a command with the arguments in `sys.argv`, and exit the process unless it succeeds.

    Errors are printed in one line on standard error. The exit code is 2 for bad input or usage, or if the command needs
    an extra that is not installed; 1 for a failed check, 130 after Ctrl-C and 143 after SIGTERM.

    Args:
        command: a click command or group.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that a stopped export cleans up
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
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        command_line = f"pip install 'gemma-mtp-export[{EXTRAS[module]}]'"
        click.echo(f"error: this command needs {module}, which is not installed; {command_line}", err=True)
        sys.exit(2)
    except CheckError as error:
        click.echo(f"failed: {error}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes, mapped files included."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar while the block runs, if the console is a terminal.

    Args:
        console: where the bar is shown.
        title: text before the bar.
        total: amount of work, usually in bytes.

    Yields:
        A function to call with the name of the current step and the amount of work that was done since the last call.
    """
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda step, amount: progress.update(task, advance=amount, description=f"{title}: {step}")
