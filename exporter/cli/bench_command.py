"""The command `bench`, which measures time and memory of a bundle on this machine."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table
from rich.text import Text

from exporter.bench.measure import (
    DEFAULT_ACCEPTANCES,
    DEFAULT_CONTEXT_TOKENS,
    FORCED_ACCEPTANCE,
    BenchOptions,
    check_same_text,
    measure_bundle,
)
from exporter.cli.options import Number, bundle_argument, json_option, threads_option
from exporter.files import human_bytes
from exporter.terminal import err, out, print_json


def bench_tables(document: dict[str, Any]) -> list[Table]:
    """Return the tables that show what was measured: times as median and minimum, costs as ratios of lower quartiles.

    Args:
        document: what `exporter.bench.measure.measure_bundle` returns.
    """
    tables = [_summary_table(document), _passes_table(document["contexts"])]
    if document["speedup"][0]["by_num_draft_tokens"]:
        tables.append(_speedup_table(document["speedup"]))
    return [*tables, _generation_table(document["generation"])]


def _summary_table(document: dict[str, Any]) -> Table:
    title = f"{document['bundle']}\n{document['machine']}, threads: {document['threads']}"
    table = Table(title=title, show_header=False)
    read, weights, load = document["read_bandwidth_gb_s"], document["decode_weights"], document["load"]
    table.add_row("backend, recipe", f"{document['backend']}, {document['recipe']}")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items()))
    table.add_row("read bandwidth", f"median {read['median']:.1f}, max {read['max']:.1f} GB/s")
    if weights["bytes"] is not None:
        table.add_row("weights of a decode step", f"{human_bytes(weights['bytes'])}, {weights['derived_from']}")
    table.add_row("load time", f"median {load['seconds']['median']:.2f}, min {load['seconds']['min']:.2f} s")
    tokens = load["resident"]["generated_tokens"]
    for name, when in (("loaded", "after loading"), ("generated", f"after {tokens} tokens")):
        if (memory := load["resident"][name]) is not None:
            parts = (f"{pages} {human_bytes(memory[pages]['added_bytes'])}" for pages in ("anonymous", "files"))
            total = human_bytes(sum(pages["total_bytes"] for pages in memory.values()))
            table.add_row(f"memory {when}", f"{' + '.join(parts)}; with the runtime {total}")
    return table


def _passes_table(contexts: Sequence[dict[str, Any]]) -> Table:
    """A row for each type of pass; for each context a column of times, and one of rates and costs."""
    table = Table("", title="Passes: median (min) of times, and rate or cost relative to a decode step")
    for context in contexts:
        for heading in (f"ms after {context['context']} tokens", ""):
            table.add_column(heading, justify="right")
    table.add_row("prefill", *_cells((c["prefill"], f"{c['prefill']['tokens_per_second']:.0f} /s") for c in contexts))
    table.add_row("decode step", *_cells((c["decode"], f"{c['decode']['tokens_per_second']:.1f} /s") for c in contexts))
    if all("share_of_bandwidth" in c["decode"] for c in contexts):
        cells = (("", f"{c['decode']['share_of_bandwidth']:.0%}") for c in contexts)
        table.add_row("  of read bandwidth", *(cell for pair in cells for cell in pair))
    for i in range(1, len(contexts[0]["passes"])):
        rows = [c["passes"][i] for c in contexts]
        table.add_row(f"{rows[0]['tokens']} tokens at once", *_cells((row, f"x {row['cost']:.2f}") for row in rows))
    drafts = [c["draft_step"] for c in contexts]
    table.add_row("draft step", *_cells((row, f"x {row['cost']:.3f}") for row in drafts))
    return table


def _cells(timed: Iterable[tuple[dict[str, Any], str]]) -> Iterator[str]:
    """Cells of a row: for each context the times, and the figure beside them."""
    for row, figure in timed:
        yield f"{row['ms']['median']:.2f} ({row['ms']['min']:.2f})"
        yield figure


def _speedup_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each context and acceptance, and a column for each number of draft tokens; the best are marked."""
    counts = range(1, len(rows[0]["by_num_draft_tokens"]) + 1)
    table = Table(*_right("context", "acceptance", *map(str, counts)))
    table.title = "Speed-up over plain decoding by draft tokens in a round, computed from these costs"
    for row in rows:
        cells = [Text(f"{speedup:.2f}") for speedup in row["by_num_draft_tokens"]]
        cells[row["best_num_draft_tokens"] - 1].stylize("bold green")
        table.add_row(f"{row['context']}", f"{row['acceptance']:g}", *cells)
    return table


def _generation_table(generation: dict[str, Any]) -> Table:
    """Measured rates of plain and speculative decoding, beside the speed-ups computed from the costs of passes."""
    headings = "drafts", "tokens/s (max)", "speed-up", "computed", "tokens a round", "expected", "same tokens"
    table = Table(*_right(*headings))
    what = f"{generation['new_tokens']} tokens after {generation['context']}, in {generation['turns']} turns"
    table.title = f"Measured: {what}, drafts accepted with a probability of {generation['acceptance']:g}"
    rate = generation["plain"]["tokens_per_second"]
    table.add_row("plain", f"{rate['median']:.1f} ({rate['max']:.1f})")
    for row in generation["speculative"]:
        rate = row["tokens_per_second"]
        table.add_row(
            f"{row['num_draft_tokens']}",
            f"{rate['median']:.1f} ({rate['max']:.1f})",
            f"{row['times_faster']:.2f}",
            f"{row['expected_times_faster']:.2f}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['expected_tokens_per_round']:.2f}",
            "yes" if generation["same_tokens"] else Text("NO", "bold red"),
        )
    return table


def _right(*headings: str) -> list[Column]:
    return [Column(heading, justify="right") for heading in headings]


_ACCEPTANCES = f"{', '.join(map(str, DEFAULT_ACCEPTANCES[:-1]))} and {DEFAULT_ACCEPTANCES[-1]}"


@click.command()
@bundle_argument
@threads_option
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(1),
    multiple=True,
    help="Number of tokens before those that are timed. Can be given more than once.",
    show_default=" and ".join(map(str, DEFAULT_CONTEXT_TOKENS)),
)
@click.option(
    "--acceptance",
    type=Number(0, 1),
    help="Probability that a draft token is accepted if those before it in the round were.",
    show_default=f"{_ACCEPTANCES} for computed speed-ups, {FORCED_ACCEPTANCE} for measured ones",
)
@json_option
def bench(
    bundle: Path, threads: int | None, contexts: tuple[int, ...], acceptance: float | None, as_json: bool
) -> None:
    """Time a bundle on this machine: passes, draft steps, memory, speed-up by drafting.

    Prompts are random, and draft tokens are accepted with a given probability, whatever the target would choose. The
    speed-up is computed from the costs of passes, and measured by generating tokens.
    """
    with err.status("bench") as status:
        options = BenchOptions(threads, contexts, acceptance)
        document = measure_bundle(bundle, options, lambda step: status.update(f"bench: {step}"), err.print)
    if as_json:
        print_json("bench", document)
    else:
        out.print(*bench_tables(document))
    check_same_text(document)
