"""`export`: a target and its drafter into a bundle."""

import json
import time
from pathlib import Path
from typing import Any

import click

from clustering.cluster_table import load_table
from exporter.bundle.export import ExportOptions, check_output, export_bundle, plan_export
from exporter.checkpoint.pair import Pair, open_pair
from exporter.cli.cluster_command import run_clustering
from exporter.cli.options import PATH, clusters_option, json_option, top_k_option
from exporter.files import directory_bytes, human_bytes, remove_leftovers
from exporter.graphs.backend import BACKENDS
from exporter.heads.clusters import ClusterOptions
from exporter.quantization.recipes import RECIPES
from exporter.terminal import err, peak_bytes, progress_bar


@click.command()
@click.option("--target", type=PATH, required=True, help="Gemma 4 E2B or E4B checkpoint.")
@click.option("--drafter", type=PATH, required=True, help="Its MTP drafter checkpoint.")
@click.option("--output", type=PATH, required=True, help="Bundle directory to write.")
@click.option("--backend", type=click.Choice(BACKENDS), default="onnx")
@click.option(
    "--recipe", type=click.Choice(list(RECIPES)), default="fp32", help="Precision of weights and activations."
)
@click.option("--max-seq-len", type=click.IntRange(2), help="Longest prompt and answer together.  [default: 4096]")
@click.option("--max-draft-tokens", type=click.IntRange(0, 32), default=8, help="Most drafts a round may have.")
@click.option(
    "--head",
    type=click.Choice(["auto", "checkpoint", "kmeans", "dense"]),
    default="auto",
    help="The drafter's output head: the checkpoint's clusters, new ones or none; auto: the checkpoint's, if any.",
)
@clusters_option
@top_k_option
@click.option("--cluster-table", type=PATH, help="For --head kmeans: what `cluster --output` wrote.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@json_option
def export(
    target: Path,
    drafter: Path,
    output: Path,
    backend: str,
    recipe: str,
    max_seq_len: int | None,
    max_draft_tokens: int,
    head: str,
    clusters: int | None,
    top_k_clusters: int | None,
    cluster_table: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export a target and its drafter into a bundle."""
    if head != "kmeans" and (clusters is not None or cluster_table is not None):
        raise click.UsageError("--clusters and --cluster-table go with --head kmeans")
    if clusters is not None and cluster_table is not None:
        raise click.UsageError("--cluster-table has its clusters already; leave --clusters out")
    check_output(output, force)
    options = ExportOptions(backend, recipe, max_seq_len, max_draft_tokens, force)
    if head == "kmeans":
        pair = open_pair(target, drafter, "dense")
        remove_leftovers(output)
        plan_export(pair, output, options)  # before minutes of clustering
        if cluster_table is not None:
            table, top_k = load_table(cluster_table, pair.drafter.text.vocab_size, pair.drafter.text.hidden_size)
        else:
            clustering = run_clustering(drafter, pair, ClusterOptions(clusters, top_k_clusters))
            table, top_k = clustering.table, clustering.top_k
        pair = pair.with_clusters(table, top_k if top_k_clusters is None else top_k_clusters, "kmeans")
    else:
        pair = open_pair(target, drafter, head, top_k_clusters)
    summary = run_export(pair, output, options)
    if as_json:
        click.echo(json.dumps(summary))


def run_export(pair: Pair, output: Path, options: ExportOptions) -> dict[str, Any]:
    started = time.perf_counter()
    total = pair.weight_bytes
    with progress_bar(err, "export", total) as progress:
        export_bundle(pair, output, options, progress)
    size = directory_bytes(output)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    err.print(f"exported {output} ({human_bytes(size)}) in {seconds:.0f} s, peak memory {human_bytes(peak)}")
    return {"bundle": str(output), "bytes": size, "seconds": seconds, "peak_bytes": peak}
