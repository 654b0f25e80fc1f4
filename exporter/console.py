"""What people see: progress bars, tables, sizes."""

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from exporter.parity import Check
from runtime_ref.errors import CheckError, InputError
from runtime_ref.stats import Stats


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


def human_bytes(size: float) -> str:
    """Decimal units, as file managers and app stores count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


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


def parity_table(checks: Sequence[Check]) -> Table:
    """One row a check, the largest error beside its tolerance."""
    table = Table("rung", "output", "", "found", title="Parity")
    for check in checks:
        verdict = Text("PASS", "green") if check.passed else Text("FAIL", "bold red")
        error = "" if check.error is None else f"{check.error:.1e} (allowed {check.tolerance:.0e})"
        table.add_row(check.rung, check.output, verdict, error or check.detail)
    return table


def recall_table(facts: dict[str, Any]) -> Table:
    """Recall by clusters kept, the chosen row marked; `facts` are those of `exporter.clusters.Clustering`."""
    sizes = f"{facts['num_clusters']} clusters of {facts['cluster_size']} tokens"
    table = Table(title=f"Two-stage logits: {sizes}, {facts['num_states']} states, {facts['states']}")
    headings = "clusters kept", "tokens scored", "of the dense head's work", "best tokens that survive"
    for heading in headings:
        table.add_column(heading, justify="right")
    if facts["checkpoint_clusters"] is not None:
        table.add_column(
            f"in the checkpoint's {facts['checkpoint_clusters']} clusters, as many tokens", justify="right"
        )
    for row in facts["curve"]:
        chosen = row["top_k_clusters"] == facts["top_k_clusters"]
        cells = [f"{row['top_k_clusters']}", f"{row['tokens_scored']}", f"{row['share_of_dense_head']:.1%}"]
        shares = (row[name] for name in ("recall", "checkpoint_recall") if name in row)
        cells += ["" if share is None else f"{share:.1%}" for share in shares]
        cells[0] = f"chosen {cells[0]}" if chosen else cells[0]
        table.add_row(*cells, style="bold green" if chosen else None)
    return table


def stats_line(stats: Stats, new_tokens: int) -> str:
    """One line under a generated text."""
    line = f"{new_tokens} tokens ({stats.finish_reason})"
    if stats.decode_seconds:
        line += f", {max(new_tokens - 1, 0) / stats.decode_seconds:.1f} tokens/s"
    if stats.acceptance_rate is not None:
        by_position = " ".join(f"{share:.0%}" for share in stats.acceptance_by_position)
        line += f", {stats.acceptance_rate:.0%} of drafts accepted ({by_position} by position)"
    if stats.mean_tokens_per_round is not None:
        line += f", {stats.mean_tokens_per_round:.2f} tokens a round"
    return line


def facts_table(facts: dict[str, Any]) -> Table:
    """Nested facts as rows of a dotted name and a value; bytes in human units."""
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)
    for name, value in _flatten("", facts):
        sized = name.startswith("files.") or name.endswith("_bytes")
        table.add_row(name, human_bytes(value) if sized else str(value))
    return table


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if prefix.endswith("_by_name"):
        yield prefix, ", ".join(f"{key} {count}" for key, count in value.items())
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value
