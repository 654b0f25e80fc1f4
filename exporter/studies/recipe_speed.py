"""Recipes of the built-in pair side by side, in one run: `python -m exporter.bench.recipes`.

Exports each of them for each backend into a temporary directory, which takes minutes on ExecuTorch (`--backend onnx`
leaves that out), then times all bundles in turns, with one thread; what a longer pass costs is a ratio of minima, as
passes are short. The pair is tiny, so its weights come from the processor's caches: what a recipe saves by being read
faster from memory, `gemma-mtp-export bench` shows on a full-size bundle.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from exporter.bench.measure import passes, random_ids
from exporter.bench.timing import machine, milliseconds
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.demo import PAIR
from exporter.files import directory_bytes, human_bytes
from exporter.graphs.backend import BACKENDS
from exporter.quantization.recipes import RECIPES
from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling

CONTEXT = 256
VERIFY = 5  # tokens of a pass that verifies four drafts


def measure(directory: Path, backends: tuple[str, ...], recipes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Bytes and times of each recipe on each backend, over bundles that are written to the directory."""
    pair = open_pair(PAIR / "target", PAIR / "drafter")
    calls: dict[tuple[Path, int | str], Callable[[], object]] = {}
    facts: list[dict[str, Any]] = []
    for backend in backends:
        for recipe in recipes:
            bundle = directory / f"{backend}-{recipe}"
            export_bundle(pair, bundle, ExportOptions(backend, recipe, max_seq_len=512))
            manifest = read_manifest(bundle)
            engine = load_engine(bundle, manifest, threads=1)
            engine.prefill(random_ids(manifest, CONTEXT), Sampling())
            found, drafts = passes(engine)
            calls |= {(bundle, kind): found[kind] for kind in (1, VERIFY, "drafts")}
            facts.append(
                {"backend": backend, "recipe": recipe, "bytes": directory_bytes(bundle), "drafts_in_a_row": drafts}
            )
    times = milliseconds(calls)
    for row in facts:
        bundle = directory / f"{row['backend']}-{row['recipe']}"
        (decode, least), (_, verify), (draft, draft_least) = (times[bundle, kind] for kind in (1, VERIFY, "drafts"))
        row |= {"decode_ms": {"median": decode, "min": least}, "verify_cost": verify / least}
        count = row["drafts_in_a_row"]
        row["draft_step_ms"] = {"median": draft / count, "min": draft_least / count}
    return facts


@click.command()
@click.option("--backend", type=click.Choice(BACKENDS), multiple=True, default=BACKENDS, show_default=True)
@click.option("--recipe", type=click.Choice(list(RECIPES)), multiple=True, default=("fp32", "int4"), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(backend: tuple[str, ...], recipe: tuple[str, ...], as_json: bool) -> None:
    """Export the built-in pair in each recipe and print times and sizes."""
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), backend, recipe)
    if as_json:
        click.echo(json.dumps({"machine": machine(), "context": CONTEXT, "bundles": rows}))
        return
    table = Table("backend", "recipe", title=f"The built-in pair after {CONTEXT} tokens\n{machine()}, one thread")
    for heading in ("bundle", "decode ms (least)", f"{VERIFY} tokens at once", "draft step ms (least)"):
        table.add_column(heading, justify="right")
    for row in rows:
        decode, draft = (f"{row[key]['median']:.2f} ({row[key]['min']:.2f})" for key in ("decode_ms", "draft_step_ms"))
        cost = f"x {row['verify_cost']:.2f}"
        table.add_row(row["backend"], row["recipe"], human_bytes(row["bytes"]), decode, cost, draft)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
