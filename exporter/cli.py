"""The `gemma-mtp-export` command: reads arguments, calls the library, prints."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from clustering.table import load_table
from exporter.backends import BACKENDS
from exporter.bench.bundle import BenchOptions, check_same_text, measure_bundle
from exporter.bundle import ExportOptions, check_options, check_output, export_bundle
from exporter.clusters import Clustering, ClusterOptions, cluster_steps, make_clusters
from exporter.console import (
    bench_tables,
    facts_table,
    parity_table,
    peak_bytes,
    progress_bar,
    recall_table,
    run_command,
    stats_line,
)
from exporter.demo import PAIR, PROMPTS
from exporter.files import check_file, human_bytes, write_file
from exporter.inspection import inspect as inspect_path
from exporter.options import DIRECTORY, DraftTokens, bench_options, clusters_option, json_option, top_k_option
from exporter.pair import Pair, open_pair
from exporter.parity import Check, open_source, run_parity
from exporter.plots import check_picture, recall_picture
from exporter.recipes import RECIPES
from runtime_ref.decoder import Options
from runtime_ref.decoder import generate as generate_tokens
from runtime_ref.engine import Engine, open_engine
from runtime_ref.errors import CheckError, InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.prompts import read_prompt_ids
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer

# No markup: paths and token texts may have brackets.
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
out = Console(markup=False, highlight=False)


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
    engine = _open(output)
    tokenizer = TextTokenizer(output, engine.manifest)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    for prompt in prompts:
        click.echo()
        _speak(engine, tokenizer, prompt, Options(96, engine.manifest.default_draft_tokens))
    click.echo()
    del engine  # parity opens its own, with one thread, and ExecuTorch has one pool a process
    checks = _parity(output, pair, prompts, 64)
    out.print(parity_table(checks))
    out.print(f"The bundle is in {output}. Next: gemma-mtp-export generate {output} --prompt 'Return the'")
    _verdict(checks)


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
@click.argument("bundle", type=DIRECTORY)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-ids", type=DIRECTORY, help="JSON file: a list of token ids, or a list of such lists.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@click.option("--mode", type=click.Choice(["speculative", "plain"]), default="speculative")
@click.option(
    "--num-draft-tokens", type=DraftTokens(), default="auto", help="Drafts a round; auto is the bundle's own."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0)
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_ids: Path | None,
    max_new_tokens: int,
    mode: str,
    num_draft_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Continue prompts with a bundle."""
    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("give either --prompt or --prompt-ids")
    engine = _open(bundle)
    manifest = engine.manifest
    drafts = manifest.default_draft_tokens if num_draft_tokens is None else num_draft_tokens
    if drafts > manifest.max_draft_tokens:
        raise InputError(f"--num-draft-tokens is {drafts}, {bundle} was exported for up to {manifest.max_draft_tokens}")
    options = Options(max_new_tokens, 0 if mode == "plain" else drafts, Sampling(temperature, top_p, seed))
    has_text = prompt is not None or (bundle / "tokenizer.json").exists()
    tokenizer = TextTokenizer(bundle, manifest) if has_text else None
    if prompt_ids is not None:
        prompts = read_prompt_ids(prompt_ids)
    else:
        assert tokenizer is not None and prompt is not None
        if not prompt:
            raise InputError("the prompt is empty: expected some text")
        prompts = [tokenizer.encode(prompt)]
    results = []
    for ids in prompts:
        if not as_json:
            _speak(engine, tokenizer, ids, options)
            continue
        stats = Stats()
        tokens = list(generate_tokens(engine, ids, options, stats))
        text = tokenizer.decode(tokens) if tokenizer else None
        results.append({"tokens": tokens, "text": text, **stats.as_dict()})
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else results))


@cli.command()
@click.argument("bundle", type=DIRECTORY)
@click.option("--target", type=DIRECTORY, help="The checkpoint it was exported from; needs --drafter.")
@click.option("--drafter", type=DIRECTORY, help="The drafter it was exported from; needs --target.")
@click.option("--prompt-ids", type=DIRECTORY, help="JSON file: a list of token ids, or a list of such lists.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32)
@json_option
def parity(
    bundle: Path,
    target: Path | None,
    drafter: Path | None,
    prompt_ids: Path | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Prove a bundle: files, weights, graphs against eager torch, plain and speculative tokens."""
    if (target is None) != (drafter is None):
        raise click.UsageError("give both --target and --drafter, or neither")
    pair = None
    if target is not None and drafter is not None:
        pair = open_source(bundle, target, drafter)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    checks = _parity(bundle, pair, prompts, max_new_tokens)
    if as_json:
        click.echo(json.dumps({"passed": all(c.passed for c in checks), "checks": [vars(c) for c in checks]}))
    else:
        out.print(parity_table(checks))
        if pair is None:
            err.print("Without --target and --drafter, only the files and losslessness were checked.")
    _verdict(checks)


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


@cli.command()
@click.argument("bundle", type=DIRECTORY)
@bench_options
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


def main() -> None:
    """Run the command; unusable input ends in one line and exit 2, a failed check in exit 1."""
    run_command(cli)


def _open(bundle: Path) -> Engine:
    with progress_bar(err, "checking files", sum(size for size, _ in read_manifest(bundle).files.values())) as progress:
        return open_engine(bundle, progress=progress)


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


def _speak(engine: Engine, tokenizer: TextTokenizer | None, prompt: list[int], options: Options) -> None:
    """Stream one answer, as text if there is a tokenizer, else as ids."""
    stats, count = Stats(), 0
    stream = tokenizer.stream() if tokenizer else None
    if tokenizer:
        click.secho(tokenizer.decode(prompt), dim=True, nl=False)
    for token in generate_tokens(engine, prompt, options, stats):
        click.echo(stream.add(token) if stream else f"{token} ", nl=False)
        count += 1
    click.echo(stream.flush() if stream else "")
    err.print(stats_line(stats, count), style="dim")


def _parity(bundle: Path, pair: Pair | None, prompts: list[list[int]], max_new_tokens: int) -> list[Check]:
    with err.status("parity") as status:
        return run_parity(bundle, pair, prompts, max_new_tokens, lambda rung: status.update(f"parity: {rung}"))


def _verdict(checks: list[Check]) -> None:
    failed = [check for check in checks if not check.passed]
    if failed:
        raise CheckError(f"parity: {len(failed)} of {len(checks)} checks, first {failed[0].rung} / {failed[0].output}")
    err.print(f"parity: all {len(checks)} checks passed", style="green")


if __name__ == "__main__":
    main()
