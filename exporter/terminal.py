"""What all commands share on a terminal: consoles, progress bars and exit codes."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runtime_ref.errors import CheckError, InputError

# No markup: rich would take brackets in paths and token texts for styles.
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
out = Console(markup=False, highlight=False)
for _console in (err, out):
    if _console.width == 0:  # as COLUMNS says where nobody set a terminal's size
        _console.width = 80

UNEXPECTED = 70  # the exit code of an error that nobody foresaw: EX_SOFTWARE in sysexits.h

# The option that every command has, see `run_command`.
TRACEBACK = "--traceback"
traceback_option = click.option(
    TRACEBACK, is_flag=True, expose_value=False, help="If the command ends with an error, print where it happened."
)

# Modules that are not among the base dependencies, and the extra that installs each.
EXTRAS = {
    **dict.fromkeys(("executorch", "torchao"), "executorch"),
    "llguidance": "grammar",
    **dict.fromkeys(("matplotlib", "onnx", "onnx_ir", "onnxscript", "safetensors", "sklearn", "torch"), "export"),
}


def run_command(command: click.Command) -> None:
    """Run a command with the arguments in `sys.argv`, and exit the process unless it succeeds.

    Errors are printed in one line on standard error. The exit code is 2 for bad input or usage, or if the command needs
    an extra that is not installed; 1 for a failed check, `UNEXPECTED` for an error that nobody foresaw, 130 after
    Ctrl-C, 141 if nobody reads the output any more, and 143 after SIGTERM. With `--traceback` the traceback of an error
    is printed before its line.

    Args:
        command: a click command or group.
    """
    _open_closed_streams()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that a stopped export cleans up
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may not hold what a model writes
            stream.reconfigure(errors="backslashreplace")
    try:
        command.main(standalone_mode=False)
    except SystemExit as stop:
        # Click ends with 1 if the reader of a pipe has ended; that is a failed check here, and 141 after SIGPIPE.
        sys.exit(141 if stop.code == 1 else stop.code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if TRACEBACK in sys.argv[1:]:
            traceback.print_exc()
        code, line = _exit_code_and_line(error)
        with contextlib.suppress(OSError):  # nobody reads it, but the code must not be that of a failed check
            click.echo(line, err=True)
        sys.exit(code)


def _open_closed_streams() -> None:
    """Take a standard output that is closed for a pipe that nobody reads; what goes to a closed standard error is lost.

    Python has None in their place, to which click prints nothing without an error, and gives their numbers to the files
    that are opened next.
    """
    if sys.stdout is None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        sys.stdout = os.fdopen(_moved(write_end, 1), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(_moved(os.open(os.devnull, os.O_WRONLY), 2), "w")


def _moved(descriptor: int, number: int) -> int:
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    return number


def _exit_code_and_line(error: Exception) -> tuple[int, str]:
    """What a command ends with after an error: its exit code, and its line on standard error."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if isinstance(error, click.ClickException):
        return 2, f"error: {error.format_message()}"
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, CheckError):
        return 1, f"failed: {error}"
    if isinstance(error, OSError):
        return 2, f"error: {error.filename or 'output'}: {error.strerror or error}"
    if module in EXTRAS:
        command_line = f"pip install 'gemma-mtp-export[{EXTRAS[module]}]'"
        return 2, f"error: this command needs {module}, which is not installed; {command_line}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return UNEXPECTED, (
        f"error: unexpected {what} ({Path(frame.filename).name}, line {frame.lineno}); this is a fault of"
        f" gemma-mtp-export: please report it, with what the same command prints with {TRACEBACK}"
    )


# Versions of the documents that commands print with `--json`. A new key keeps the version, other changes raise it.
SCHEMA_VERSIONS = dict.fromkeys(
    (
        "export",
        "generate",
        "prefill",
        "parity",
        "inspect",
        "bench",
        "cluster",
        "doctor",
        "recipe",
        "report",
        "synthetic",
    ),
    1,
)


def print_json(command: str, document: Any) -> None:
    """Print a document, or a list of them, as one line of JSON on standard output, each with its `schema_version`.

    NaN and infinity, which JSON lacks, become null.

    Args:
        command: name of the command, a key of `SCHEMA_VERSIONS`.
        document: an object, or a list of objects.
    """
    version = {"schema_version": SCHEMA_VERSIONS[command]}
    versioned = [version | entry for entry in document] if isinstance(document, list) else version | document
    click.echo(json.dumps(_finite(versioned), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


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
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *times
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=3600,  # seconds; within Rich's 30 no step of a large model ends
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda step, amount: progress.update(task, advance=amount, description=f"{title}: {step}")
