"""`cluster`: clusters for drafters that have none, judged by recall."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from exporter.checkpoint.pair import Pair, open_pair
from exporter.cli.options import PATH, clusters_option, json_option, top_k_option
from exporter.files import check_file, human_bytes, write_file
from exporter.heads.clusters import Clustering, ClusterOptions, cluster_steps, make_clusters
from exporter.heads.recall_plot import check_picture, recall_picture
from exporter.terminal import err, out, peak_bytes, progress_bar
from runtime_ref.prompts import read_prompt_ids


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


@click.command()
@click.option("--drafter", type=PATH, required=True, help="MTP drafter checkpoint.")
@click.option("--target", type=PATH, help="Its target: recall is then measured on states of real drafting.")
@click.option("--prompt-ids", type=PATH, help="JSON file of token ids to draft on, else random ones.")
@clusters_option
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    help=f"Keep as few clusters as reach this.  [default: {ClusterOptions.recall}]",
)
@top_k_option
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the k-means.")
@click.option("--output", type=PATH, help="Write the clusters to this safetensors file, for export.")
@click.option("--report", type=PATH, help="Write a picture of recall against work to this file.")
@click.option("--force", is_flag=True, help="Replace files that are there already.")
@json_option
def cluster(
    drafter: Path,
    target: Path | None,
    prompt_ids: Path | None,
    clusters: int | None,
    recall: float | None,
    top_k_clusters: int | None,
    seed: int,
    output: Path | None,
    report: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Cluster a drafter's vocabulary, and show how many of its best tokens survive at what cost."""
    if prompt_ids is not None and target is None:
        raise click.UsageError("--prompt-ids needs --target, which reads them")
    if top_k_clusters is not None and recall is not None:
        raise click.UsageError("give either --recall or --top-k-clusters: each says how many clusters to keep")
    files = [file for file in (output, report) if file is not None]
    for file in files:
        check_file(file, force)
    if len({file.resolve() for file in files}) < len(files):
        raise click.UsageError("--output and --report name the same file")
    if report is not None:
        check_picture(report)
    started = time.perf_counter()
    pair = None if target is None else open_pair(target, drafter, "dense")
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    options = ClusterOptions(clusters, top_k_clusters, ClusterOptions.recall if recall is None else recall, seed)
    clustering = run_clustering(drafter, pair, options, prompts)
    facts = {**clustering.facts(), "seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    if output is not None:
        write_file(output, clustering.table.to_bytes(clustering.top_k))
    if report is not None:
        write_file(report, recall_picture(clustering, report))
    if as_json:
        click.echo(json.dumps(facts))
    else:
        out.print(recall_table(facts))
    err.print(f"clustered in {facts['seconds']:.0f} s, peak memory {human_bytes(facts['peak_bytes'])}")


def run_clustering(
    drafter: Path, pair: Pair | None, options: ClusterOptions, prompts: Sequence[Sequence[int]] = ()
) -> Clustering:
    with progress_bar(err, "clusters", cluster_steps(pair, prompts)) as progress:
        clustering = make_clusters(drafter, pair, options, prompts, progress)
    if (share := clustering.share_of_dense_head) > 0.5:
        err.print(
            f"warning: {clustering.top_k} of {len(clustering.recall)} clusters kept takes {share:.0%} of a dense head's"
            " work, so a dense head may be faster; try another number of clusters, or keep fewer"
        )
    return clustering
