"""The command `cluster`, which makes clusters for a drafter and measures their recall."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from clustering.recall import DEFAULT_RECALL
from exporter.cli.options import (
    OR_ID,
    PATH,
    Number,
    adapter_option,
    clusters_option,
    json_option,
    prompt_ids_option,
    top_k_option,
)
from exporter.files import check_file, human_bytes, write_file
from exporter.heads.recall_plot import FORMATS, check_picture, recall_picture
from exporter.terminal import err, out, peak_bytes, print_json, progress_bar
from runtime_ref.prompts import read_prompt_ids

if TYPE_CHECKING:
    from exporter.checkpoint.pair import Pair
    from exporter.heads.clusters import Clustering, ClusterOptions
    from exporter.texts.token_texts import TokenTexts


def recall_table(document: dict[str, Any]) -> Table:
    """Return a table of recall and work by the number of clusters kept, in which the chosen number is marked.

    Args:
        document: what `exporter.heads.clusters.Clustering.measurements` returns.
    """
    sizes = f"{document['num_clusters']} clusters of {document['cluster_size']} tokens"
    table = Table(title=f"Two-stage logits: {sizes}, {document['num_states']} states, {document['states']}")
    headings = "clusters kept", "tokens scored", "work relative to a dense head", "recall of the best token"
    for heading in headings:
        table.add_column(heading, justify="right")
    if document["checkpoint_clusters"] is not None:
        table.add_column(
            f"recall of the checkpoint's {document['checkpoint_clusters']} clusters at as many tokens", justify="right"
        )
    for row in document["curve"]:
        chosen = row["top_k_clusters"] == document["top_k_clusters"]
        cells = [f"{row['top_k_clusters']}", f"{row['tokens_scored']}", f"{row['share_of_dense_head']:.1%}"]
        recalls = (row[name] for name in ("recall", "checkpoint_recall") if name in row)
        cells += ["" if recall is None else f"{recall:.1%}" for recall in recalls]
        cells[0] = f"chosen {cells[0]}" if chosen else cells[0]
        table.add_row(*cells, style="bold green" if chosen else None)
    return table


@click.command()
@click.option("--drafter", type=PATH, required=True, help=f"Checkpoint directory of the MTP drafter, {OR_ID}.")
@click.option(
    "--target",
    type=PATH,
    help="Checkpoint directory of its target, or its id. Recall is then measured on hidden states of real draft steps.",
)
@adapter_option
@prompt_ids_option()
@click.option(
    "--text",
    type=PATH,
    help="Texts to fit the clusters on, like those of your users: a text file in UTF-8, or JSON as for --prompt-ids. "
    "Needs --target.",
    show_default="a set of this package and what the target writes",
)
@clusters_option
@click.option(
    "--recall",
    type=Number(0, 1, min_open=True),
    help="Keep the smallest number of clusters that reaches this recall.",
    show_default=str(DEFAULT_RECALL),
)
@top_k_option
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of k-means.")
@click.option("--output", type=PATH, help="Safetensors file to write, for `export --cluster-table`.")
@click.option(
    "--report", type=PATH, help=f"Image of recall against work to write; its name ends in {' or '.join(FORMATS)}."
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@json_option
def cluster(
    drafter: Path,
    target: Path | None,
    adapters: tuple[Path, ...],
    prompt_ids: Path | None,
    text: Path | None,
    clusters: int | None,
    recall: float | None,
    top_k_clusters: int | None,
    seed: int,
    output: Path | None,
    report: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Cluster a drafter's vocabulary for a two-stage head, and measure its recall.

    Recall is the fraction of hidden states whose best token is in a cluster that the first stage keeps.
    """
    from exporter.checkpoint.config_json import read_drafter_config
    from exporter.checkpoint.hub import local_checkpoint
    from exporter.checkpoint.pair import open_pair
    from exporter.heads.clusters import ClusterOptions, num_clusters
    from exporter.texts.token_texts import TokenTexts

    if (prompt_ids or text or adapters) and target is None:
        raise click.UsageError("--text, --prompt-ids and --adapter need --target, which runs them")
    if prompt_ids and text:
        raise click.UsageError("give either --text or --prompt-ids")
    if top_k_clusters is not None and recall is not None:
        raise click.UsageError("give either --recall or --top-k-clusters: each decides how many clusters to keep")
    check_files(output, report, force)
    started = time.perf_counter()
    drafter, *merged = map(local_checkpoint, (drafter, *adapters))
    pair = None if target is None else open_pair(local_checkpoint(target), drafter, "dense", adapter_dirs=merged)
    options = ClusterOptions(clusters, top_k_clusters, DEFAULT_RECALL if recall is None else recall, seed)
    num_clusters(read_drafter_config(drafter), options)  # raises before minutes in which the target writes texts
    texts: TokenTexts | None = None
    if prompt_ids is not None:
        texts = TokenTexts(tuple(map(tuple, read_prompt_ids(prompt_ids))), "the prompts")
    elif pair is not None:
        texts = texts_to_fit(pair, text)
    clustering = run_clustering(drafter, pair, options, texts)
    document = {**clustering.measurements(), "seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}
    if output is not None:
        write_file(output, clustering.table.to_bytes(clustering.top_k))
    if report is not None:
        write_file(report, recall_picture(clustering, report))
    if as_json:
        print_json("cluster", document)
    else:
        out.print(recall_table(document))
    err.print(f"clustered in {document['seconds']:.0f} s, peak memory {human_bytes(document['peak_bytes'])}")


def check_files(output: Path | None, report: Path | None, force: bool) -> None:
    """Check before any work is done that a command's files can be written, of which the report is a picture.

    Raises:
        UsageError: both are the same file.
        InputError: one cannot be written, or the picture's name has another ending.
    """
    files = [file for file in (output, report) if file is not None]
    for file in files:
        check_file(file, force)
    if len({file.resolve() for file in files}) < len(files):
        raise click.UsageError("--output and --report name the same file; choose two files")
    if report is not None:
        check_picture(report)


def texts_to_fit(pair: "Pair", file: Path | None = None) -> "TokenTexts":
    """Return the texts of `exporter.texts.token_texts.fitting_texts`, with a progress bar while the target writes."""
    from exporter.texts.token_texts import fitting_texts
    from exporter.texts.writing import TEXT_TOKENS

    with progress_bar(err, "texts", TEXT_TOKENS) as progress:
        return fitting_texts(pair, file, progress)


def run_clustering(
    drafter: Path,
    pair: "Pair | None",
    options: "ClusterOptions",
    texts: "TokenTexts | None",
) -> "Clustering":
    """Make clusters with a progress bar, and warn if their head would need more than half of a dense head's work.

    Args:
        drafter: the drafter's checkpoint directory.
        pair: the opened pair, to measure recall on states of real draft steps, or None.
        options: options of the clustering.
        texts: token ids for the target to run; None without a pair.

    Raises:
        InputError: see `exporter.heads.clusters.make_clusters`.
    """
    from exporter.heads.clusters import cluster_steps, make_clusters

    with progress_bar(err, "clusters", cluster_steps(texts)) as progress:
        clustering = make_clusters(drafter, pair, options, texts, progress)
    if (work := clustering.work_ratio) > 0.5:
        err.print(
            f"warning: keeping {clustering.top_k} of {len(clustering.recall)} clusters takes {work:.0%} of a dense"
            " head's work, so a dense head may be faster; try another number of clusters, or keep fewer"
        )
    return clustering
