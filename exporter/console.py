"""What people see: progress bars, tables, sizes."""

import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from exporter.doctor.diagnosis import Diagnosis
from exporter.files import human_bytes
from exporter.parity import Check
from runtime_ref.errors import CheckError, InputError
from runtime_ref.stats import Stats

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


def parity_table(checks: Sequence[Check]) -> Table:
    """One row a check, the largest error beside its tolerance."""
    table = Table("rung", "output", "", "found", title="Parity")
    for check in checks:
        verdict = Text("PASS", "green") if check.passed else Text("FAIL", "bold red")
        error = "" if check.error is None else f"{check.error:.1e} (allowed {check.tolerance:.0e})"
        table.add_row(check.rung, check.output, verdict, error or check.detail)
    return table


VERDICTS = {"pass": ("PASS", "green"), "finding": ("FINDING", "bold red"), "skipped": ("skipped", "dim")}


def doctor_table(diagnosis: Diagnosis) -> Table:
    """One row an experiment."""
    title = "Why is acceptance low?"
    if diagnosis.acceptance_rate is not None:
        title += f" The bundle accepts {diagnosis.acceptance_rate:.1%} of its drafts here"
    table = Table("experiment", "", Column("found", overflow="fold"), title=title)
    for found in diagnosis.experiments:
        table.add_row(found.experiment, Text(*VERDICTS[found.verdict]), found.detail)
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


def bench_tables(facts: dict[str, Any]) -> list[Table]:
    """What `exporter.bench.bundle` measured; of times both median and minimum, ratios of lower quartiles."""
    tables = [_bench_facts(facts), _bench_passes(facts["contexts"])]
    if facts["speedup"][0]["by_num_draft_tokens"]:
        tables.append(_bench_gains(facts["speedup"]))
    return [*tables, _bench_generation(facts["generation"])]


def _bench_facts(facts: dict[str, Any]) -> Table:
    table = Table(title=f"{facts['bundle']}\n{facts['machine']}, threads: {facts['threads']}", show_header=False)
    read, weights, load = facts["read_bandwidth_gb_s"], facts["decode_weights"], facts["load"]
    table.add_row("backend, recipe", f"{facts['backend']}, {facts['recipe']}")
    table.add_row("versions", ", ".join(f"{name} {found}" for name, found in facts["versions"].items()))
    table.add_row("read bandwidth", f"median {read['median']:.1f}, most {read['max']:.1f} GB/s")
    if weights["bytes"] is not None:
        table.add_row("weights of a decode step", f"{human_bytes(weights['bytes'])}, {weights['derived_from']}")
    table.add_row("load time", f"median {load['seconds']['median']:.2f}, least {load['seconds']['min']:.2f} s")
    tokens = load["resident"]["generated_tokens"]
    for name, when in (("loaded", "after loading"), ("generated", f"after {tokens} tokens")):
        if (memory := load["resident"][name]) is not None:
            parts = (f"{kind} {human_bytes(memory[kind]['added_bytes'])}" for kind in ("anonymous", "files"))
            total = human_bytes(sum(kind["total_bytes"] for kind in memory.values()))
            table.add_row(f"memory {when}", f"{' + '.join(parts)}; with the runtime {total}")
    return table


def _bench_passes(contexts: Sequence[dict[str, Any]]) -> Table:
    """One row a kind of pass, two columns a context: milliseconds, and the cost relative to a decode step or a rate."""
    table = Table("", title="Passes: median (least), and what they cost beside a decode step")
    for found in contexts:
        for heading in (f"ms after {found['context']} tokens", ""):
            table.add_column(heading, justify="right")
    lengths = range(len(contexts[0]["passes"]))
    table.add_row("prefill", *_pairs((c["prefill"], f"{c['prefill']['tokens_per_second']:.0f} /s") for c in contexts))
    table.add_row("decode step", *_pairs((c["decode"], f"{c['decode']['tokens_per_second']:.1f} /s") for c in contexts))
    if all("share_of_bandwidth" in c["decode"] for c in contexts):
        cells = (("", f"{c['decode']['share_of_bandwidth']:.0%}") for c in contexts)
        table.add_row("  of read bandwidth", *(cell for pair in cells for cell in pair))
    for i in lengths[1:]:
        rows = [c["passes"][i] for c in contexts]
        table.add_row(f"{rows[0]['tokens']} tokens at once", *_pairs((row, f"x {row['cost']:.2f}") for row in rows))
    drafts = [c["draft_step"] for c in contexts]
    table.add_row("draft step", *_pairs((row, f"x {row['cost']:.3f}") for row in drafts))
    return table


def _pairs(timed: Iterable[tuple[dict[str, Any], str]]) -> Iterator[str]:
    """Cells of what was timed and the figure beside it."""
    for row, figure in timed:
        yield f"{row['ms']['median']:.2f} ({row['ms']['min']:.2f})"
        yield figure


def _bench_gains(gains: Sequence[dict[str, Any]]) -> Table:
    """Speed-up by drafts a round, the best of each row marked."""
    counts = range(1, len(gains[0]["by_num_draft_tokens"]) + 1)
    table = Table(*_right("context", "accepted", *map(str, counts)))
    table.title = "Times faster than plain decoding by drafts a round, computed from these costs"
    for row in gains:
        cells = [Text(f"{found:.2f}") for found in row["by_num_draft_tokens"]]
        cells[row["best_num_draft_tokens"] - 1].stylize("bold green")
        table.add_row(f"{row['context']}", f"{row['acceptance']:g}", *cells)
    return table


def _bench_generation(facts: dict[str, Any]) -> Table:
    """Plain and speculative text, measured."""
    headings = "drafts", "tokens/s (most)", "times faster", "computed", "tokens a round", "expected", "same tokens"
    table = Table(*_right(*headings))
    what = f"{facts['new_tokens']} tokens after {facts['context']}, in {facts['turns']} turns"
    table.title = f"Measured: {what}, drafts accepted with a chance of {facts['acceptance']:g}"
    rate = facts["plain"]["tokens_per_second"]
    table.add_row("plain", f"{rate['median']:.1f} ({rate['max']:.1f})")
    for row in facts["speculative"]:
        rate = row["tokens_per_second"]
        table.add_row(
            f"{row['num_draft_tokens']}",
            f"{rate['median']:.1f} ({rate['max']:.1f})",
            f"{row['times_faster']:.2f}",
            f"{row['expected_times_faster']:.2f}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['expected_tokens_per_round']:.2f}",
            "yes" if facts["same_tokens"] else Text("NO", "bold red"),
        )
    return table


def _right(*headings: str) -> list[Column]:
    return [Column(heading, justify="right") for heading in headings]


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
    if stats.reused_tokens > 1:  # the token that begins every text is nothing to tell
        line += f", {stats.reused_tokens} prompt tokens reused"
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
