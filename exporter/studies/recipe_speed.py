"""Speed and size of the built-in pair by recipe and backend, in one run: `python -m exporter.studies.recipe_speed`.

Exports the pair in each recipe for each backend into a temporary directory, then times all bundles in turns, with one
thread. ExecuTorch takes minutes to export; `--backend onnx` leaves it out. The cost of a longer pass is a ratio of
minima, because passes are short. The pair is tiny, so its weights stay in the processor's caches: what a recipe gains
by reading fewer bytes from memory shows only when `gemma-mtp-export bench` measures a bundle of full size.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from exporter.bench.measure import pass_calls, random_ids
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

CONTEXT_TOKENS = 256
VERIFY_TOKENS = 5  # of a pass that verifies four drafts


def measure(directory: Path, backends: tuple[str, ...], recipes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Export and time the built-in pair in each recipe on each backend.

    Args:
        directory: an existing directory, to which the bundles are written.
        backends: names of backends.
        recipes: names of recipes.

    Returns:
        The entries of `bundles` in the `--json` document; times are in milliseconds, and `verify_cost` is the time of
        a pass of `VERIFY_TOKENS` tokens relative to that of a decode step.
    """
    pair = open_pair(PAIR / "target", PAIR / "drafter")
    calls: dict[tuple[Path, int | str], Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for backend in backends:
        for recipe in recipes:
            bundle = directory / f"{backend}-{recipe}"
            export_bundle(pair, bundle, ExportOptions(backend, RECIPES[recipe], max_seq_len=512))
            manifest = read_manifest(bundle)
            engine = load_engine(bundle, manifest, threads=1)
            engine.prefill(random_ids(manifest, CONTEXT_TOKENS), Sampling())
            timed, drafts = pass_calls(engine)
            calls |= {(bundle, key): timed[key] for key in (1, VERIFY_TOKENS, "drafts")}
            rows.append(
                {"backend": backend, "recipe": recipe, "bytes": directory_bytes(bundle), "drafts_in_a_row": drafts}
            )
    times = milliseconds(calls)
    for row in rows:
        bundle = directory / f"{row['backend']}-{row['recipe']}"
        (decode, decode_min), (_, verify_min), (drafts_median, drafts_min) = (
            times[bundle, key] for key in (1, VERIFY_TOKENS, "drafts")
        )
        row |= {"decode_ms": {"median": decode, "min": decode_min}, "verify_cost": verify_min / decode_min}
        count = row["drafts_in_a_row"]
        row["draft_step_ms"] = {"median": drafts_median / count, "min": drafts_min / count}
    return rows


@click.command()
@click.option("--backend", type=click.Choice(BACKENDS), multiple=True, default=BACKENDS, show_default=True)
@click.option("--recipe", type=click.Choice(list(RECIPES)), multiple=True, default=("fp32", "int4"), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(backend: tuple[str, ...], recipe: tuple[str, ...], as_json: bool) -> None:
    """Export the built-in pair in each recipe and print times and sizes."""
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), backend, recipe)
    if as_json:
        click.echo(json.dumps({"machine": machine(), "context": CONTEXT_TOKENS, "bundles": rows}))
        return
    table = Table(
        "backend", "recipe", title=f"The built-in pair after {CONTEXT_TOKENS} tokens\n{machine()}, one thread"
    )
    for heading in ("bundle", "decode ms (min)", f"{VERIFY_TOKENS} tokens at once", "draft step ms (min)"):
        table.add_column(heading, justify="right")
    for row in rows:
        decode, draft = (f"{row[key]['median']:.2f} ({row[key]['min']:.2f})" for key in ("decode_ms", "draft_step_ms"))
        cost = f"x {row['verify_cost']:.2f}"
        table.add_row(row["backend"], row["recipe"], human_bytes(row["bytes"]), decode, cost, draft)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
