"""`bench`: the time and memory that a bundle takes on this machine."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table
from rich.text import Text

from exporter.bench.measure import BenchOptions, check_same_text, measure_bundle
from exporter.cli.options import bundle_argument, json_option, threads_option
from exporter.files import human_bytes
from exporter.terminal import err, out


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


@click.command()
@bundle_argument
@threads_option
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(1),
    multiple=True,
    help="Tokens before those that are timed; may be given more than once.  [default: 512 and 4096]",
)
@click.option(
    "--acceptance",
    type=click.FloatRange(0, 1),
    help="Chance of a draft if those before it were accepted.  [default: 0.3 to 0.9; 0.7 for measured text]",
)
@json_option
def bench(
    bundle: Path, threads: int | None, contexts: tuple[int, ...], acceptance: float | None, as_json: bool
) -> None:
    """Time a bundle: passes, drafts, memory, and what drafting gains at a given acceptance."""
    with err.status("bench") as status:
        options = BenchOptions(threads, contexts, acceptance)
        facts = measure_bundle(bundle, options, lambda step: status.update(f"bench: {step}"), err.print)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        out.print(*bench_tables(facts))
    check_same_text(facts)
