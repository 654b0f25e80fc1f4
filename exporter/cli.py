"""The `gemma-mtp-export` command: reads arguments, calls the library, prints."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from clustering.cluster_table import load_table
from exporter.backends import BACKENDS
from exporter.bundle import ExportOptions, check_options, check_output, export_bundle
from exporter.cli_bundle import bench, check_parity, doctor, generate, open_bundle, parity, report, speak, verdict
from exporter.clusters import Clustering, ClusterOptions, cluster_steps, make_clusters
from exporter.console import (
    err,
    facts_table,
    out,
    parity_table,
    peak_bytes,
    progress_bar,
    recall_table,
    run_command,
)
from exporter.demo import PAIR, PROMPTS
from exporter.files import check_file, human_bytes, write_file
from exporter.inspection import inspect as inspect_path
from exporter.options import DIRECTORY, clusters_option, json_option, top_k_option
from exporter.pair import Pair, open_pair
from exporter.plots import check_picture, recall_picture
from exporter.recipes import RECIPES
from runtime_ref.prompts import read_prompt_ids


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="gemma-mtp-export")
def cli() -> None:
    """Export Gemma 4 E2B/E4B with its MTP drafter to phones, and prove that nothing was lost."""


@cli.command()
@click.option("--output", type=DIRECTORY, default=Path("demo-bundle"), help="Where the bundle goes; replaced if there.")
@click.option("--backend", type=click.Choice(BACKENDS), default="onnx")
def demo(output: Path, backend: str) -> None:
    """Export the built-in pair, let it speak, and check parity."""
    pair = open_pair(PAIR / "target", PAIR / "drafter")
    _export(pair, output, ExportOptions(backend=backend, max_seq_len=512, force=True))
    decoder, prompts = open_bundle(output), []
    for text in PROMPTS:
        click.echo()
        speak(decoder, stream := decoder.stream(text, max_new_tokens=96))
        prompts.append(stream.prompt)
    click.echo()
    del decoder, stream  # parity opens its own, with one thread, and ExecuTorch has one pool a process
    checks = check_parity(output, pair, prompts, 64)
    out.print(parity_table(checks))
    out.print(f"The bundle is in {output}. Next: gemma-mtp-export generate {output} --prompt 'Return the'")
    verdict(checks)


@cli.command()
@click.option("--target", type=DIRECTORY, required=True, help="Gemma 4 E2B or E4B checkpoint.")
@click.option("--drafter", type=DIRECTORY, required=True, help="Its MTP drafter checkpoint.")
@click.option("--output", type=DIRECTORY, required=True, help="Bundle directory to write.")
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
@click.option("--cluster-table", type=DIRECTORY, help="For --head kmeans: what `cluster --output` wrote.")
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
        check_options(pair, output, options)  # before minutes of clustering
        if cluster_table is not None:
            table, top_k = load_table(cluster_table, pair.drafter.text.vocab_size, pair.drafter.text.hidden_size)
        else:
            clustering = _cluster(drafter, pair, ClusterOptions(clusters, top_k_clusters))
            table, top_k = clustering.table, clustering.top_k
        pair = pair.with_clusters(table, top_k if top_k_clusters is None else top_k_clusters, "kmeans")
    else:
        pair = open_pair(target, drafter, head, top_k_clusters)
    summary = _export(pair, output, options)
    if as_json:
        click.echo(json.dumps(summary))


@cli.command()
@click.option("--drafter", type=DIRECTORY, required=True, help="MTP drafter checkpoint.")
@click.option("--target", type=DIRECTORY, help="Its target: recall is then measured on states of real drafting.")
@click.option("--prompt-ids", type=DIRECTORY, help="JSON file of token ids to draft on, else random ones.")
@clusters_option
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    help=f"Keep as few clusters as reach this.  [default: {ClusterOptions.recall}]",
)
@top_k_option
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the k-means.")
@click.option("--output", type=DIRECTORY, help="Write the clusters to this safetensors file, for export.")
@click.option("--report", type=DIRECTORY, help="Write a picture of recall against work to this file.")
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
    clustering = _cluster(drafter, pair, options, prompts)
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


@cli.command()
@click.argument("path", type=DIRECTORY)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds."""
    facts = inspect_path(path)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        out.print(facts_table(facts))


for command in (generate, parity, bench, report, doctor):
    cli.add_command(command)


def main() -> None:
    """Run the command; unusable input ends in one line and exit 2, a failed check in exit 1."""
    run_command(cli)


def _export(pair: Pair, output: Path, options: ExportOptions) -> dict[str, Any]:
    started = time.perf_counter()
    total = pair.weight_bytes
    with progress_bar(err, "export", total) as progress:
        export_bundle(pair, output, options, progress)
    size = sum(file.stat().st_size for file in output.iterdir())
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    err.print(f"exported {output} ({human_bytes(size)}) in {seconds:.0f} s, peak memory {human_bytes(peak)}")
    return {"bundle": str(output), "bytes": size, "seconds": seconds, "peak_bytes": peak}


def _cluster(
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


if __name__ == "__main__":
    main()
