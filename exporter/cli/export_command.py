"""The command `export`, which writes a bundle, and what other commands share with it."""

import time
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.cluster_command import run_clustering, texts_to_fit
from exporter.cli.options import (
    BYTES,
    OR_ID,
    PATH,
    RECIPE,
    adapter_option,
    backend_option,
    calibration_options,
    clusters_option,
    json_option,
    top_k_option,
)
from exporter.cli.recipe_command import bits_table, measure_bits, refuse_too_few
from exporter.files import directory_bytes, human_bytes, keeping
from exporter.quantization.recipes import AUTO, Recipe
from exporter.terminal import err, peak_bytes, print_json, progress_bar
from runtime_ref.errors import CheckError, InputError

if TYPE_CHECKING:
    from exporter.bundle.export import ExportOptions
    from exporter.checkpoint.pair import Pair
    from exporter.texts.token_texts import TokenTexts


@click.command()
@click.option("--target", type=PATH, required=True, help=f"Checkpoint directory of Gemma 4 E2B or E4B, {OR_ID}.")
@click.option("--drafter", type=PATH, required=True, help="Checkpoint directory of its MTP drafter, or its id.")
@adapter_option
@click.option("--output", type=PATH, required=True, help="Bundle directory to write.")
@backend_option
@click.option(
    "--recipe",
    type=RECIPE,
    default=AUTO,
    help="Precision: float32 (`fp32`), or 8-bit activations and weights of 8 bits (`int8`), mostly 4 bits (`int4`), or "
    "4 and 2 bits (`smallest`); or a TOML file of rules. `auto` keeps the checkpoint's integers or grids, and is "
    "`int4` elsewhere.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(2),
    help="Maximum number of tokens in prompt and answer together.",
    show_default="4096, or the target's maximum if that is less",
)
@click.option(
    "--max-draft-tokens", type=click.IntRange(0, 32), default=8, help="Maximum number of draft tokens in a round."
)
@click.option(
    "--head",
    type=click.Choice(["auto", "checkpoint", "kmeans", "dense"]),
    default="auto",
    help="The drafter's output head: two stages with the clusters of the `checkpoint` or with new ones (`kmeans`), or "
    "one stage (`dense`). `auto` uses the checkpoint's clusters if it has some, else a dense head.",
)
@clusters_option
@top_k_option
@click.option("--cluster-table", type=PATH, help="File of `cluster --output` with clusters for `--head kmeans`.")
@click.option(
    "--max-file-size",
    type=BYTES,
    help="Maximum size of each file, in bytes, such as `1.5e9`: larger ones of weights and tables are split, but not "
    "ExecuTorch's program.",
    show_default="none",
)
@click.option(
    "--target-bytes",
    type=BYTES,
    help="Maximum size of the bundle, such as `2.2e9`: choose a recipe for it by what bits cost, as `recipe` does, and "
    "print it.",
)
@click.option(
    "--activations",
    type=click.Choice(["runtime", "checkpoint"]),
    default="runtime",
    help="How inputs of matrices are rounded to 8 bits: by their own range, as the `runtime` does, or as a mobile QAT "
    "`checkpoint` says, outputs too, which is exact and slow, and for ONNX alone.",
)
@calibration_options
@click.option(
    "--tools",
    type=PATH,
    help="JSON file with a list of tools, as for `generate --tools`, that apps without Jinja can offer the model.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--skip-room-check", is_flag=True, help="Do not check first that disk and memory suffice.")
@json_option
def export(
    target: Path,
    drafter: Path,
    adapters: tuple[Path, ...],
    output: Path,
    backend: str,
    recipe: "Recipe | None",
    max_seq_len: int | None,
    max_draft_tokens: int,
    head: str,
    clusters: int | None,
    top_k_clusters: int | None,
    cluster_table: Path | None,
    max_file_size: int | None,
    target_bytes: int | None,
    activations: str,
    calibrate: bool | None,
    calibration: Path | None,
    tools: Path | None,
    force: bool,
    skip_room_check: bool,
    as_json: bool,
) -> None:
    """Export a target and its drafter into a bundle.

    Checkpoints are directories with config.json and safetensors files, as published or as transformers saves them. The
    same checkpoints and options give the same bytes; with a calibration, on the same kind of processor with as many
    threads. What was killed goes on where it was, by what `.NAME.kept` beside the output holds until it is written.
    """
    from clustering.cluster_table import load_table
    from exporter.bundle.export import ExportOptions, check_output, plan_export
    from exporter.bundle.plain_chat import plain_chat
    from exporter.checkpoint.hub import local_checkpoint
    from exporter.checkpoint.pair import open_pair
    from exporter.graphs.auto_recipe import auto_recipe
    from exporter.graphs.backend import load_backend
    from exporter.heads.clusters import ClusterOptions, num_clusters
    from exporter.texts.token_texts import kept_texts, token_texts
    from runtime_ref.chat import read_tools

    if head != "kmeans" and (clusters is not None or cluster_table is not None):
        raise click.UsageError("--clusters and --cluster-table go with --head kmeans")
    if clusters is not None and cluster_table is not None:
        raise click.UsageError("--cluster-table has a fixed number of clusters; leave out --clusters")
    if target_bytes is not None and recipe is not None:
        raise click.UsageError("--target-bytes chooses a recipe; leave out --recipe")
    check_output(output, force)
    target, drafter, *merged = map(local_checkpoint, (target, drafter, *adapters))
    opened = ("dense", None) if head == "kmeans" else (head, top_k_clusters)
    pair = open_pair(target, drafter, *opened, merged)
    # What can be refused is refused before minutes of clustering or calibration.
    load_backend(backend)
    if activations == "checkpoint":
        if not pair.activation_scales:
            raise InputError(f"--activations checkpoint: {target} has no scales of activations; leave it out")
        pair = pair.with_activations()
    recipe, reason = auto_recipe(pair) if recipe is None else (recipe, "")
    options = ExportOptions(backend, recipe, max_seq_len, max_draft_tokens, force, not skip_room_check, max_file_size)
    plan_export(pair, output, options, head == "kmeans")
    if tools is not None:
        offered = read_tools(tools)
        if not offered:
            raise InputError(f"{tools}: has no tools; leave --tools out")
        options = replace(options, chat=plain_chat(target, pair.tokens, offered))
    texts = None if calibration is None else token_texts(pair, calibration)
    calibrate = True if calibration else calibrate
    if target_bytes is not None:
        refuse_too_few(pair, backend, target_bytes)
    with keeping(output) as kept:
        if head == "kmeans":
            if cluster_table is not None:
                table, top_k = load_table(cluster_table, pair.drafter.text.vocab_size, pair.drafter.text.hidden_size)
            else:
                cluster_options = ClusterOptions(clusters, top_k_clusters)
                num_clusters(pair.drafter, cluster_options)
                fitted_on = kept_texts(kept / "texts.json", pair, partial(texts_to_fit, pair))
                texts = texts or fitted_on  # which take minutes at full size
                clustering = run_clustering(drafter, pair, cluster_options, fitted_on)
                table, top_k = clustering.table, clustering.top_k
            pair = pair.with_clusters(table, top_k if top_k_clusters is None else top_k_clusters, "kmeans")
        if target_bytes is not None:
            bits, texts = measure_bits(pair, backend, calibrate, texts, kept)
            choice = bits.choose(target_bytes)
            recipe, reason = choice.recipe("chosen"), ""
            options = replace(options, recipe=recipe)
            err.print(bits_table(bits, choice))
            err.print(f"chosen for {target_bytes} bytes, with a KL of {choice.kl:.4f} by the sum of the classes:")
            click.echo(recipe.toml(), nl=False, err=as_json)
        summary = run_export(pair, output, options, calibrate, texts, kept)
        if reason:
            err.print(f"recipe {recipe.name}: {reason}")
        if as_json:
            print_json("export", {**summary, "rules": recipe.toml()})
        size = summary["bytes"]
        if target_bytes is not None and size > target_bytes:  # what was measured is kept for the next try
            raise CheckError(f"{output}: has {size} bytes, expected at most {target_bytes}; give fewer bytes")


def _folded(bundle: Path) -> list[str]:
    """The weights of a bundle's target that factors were folded into."""
    from safetensors import safe_open

    from exporter.checkpoint.folding import FOLDING

    if not (bundle / FOLDING).is_file():
        return []
    with safe_open(bundle / FOLDING, "pt") as file:
        return sorted(file.keys())


def run_export(
    pair: "Pair",
    output: Path,
    options: "ExportOptions",
    calibrate: bool | None = False,
    texts: "TokenTexts | None" = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Export a pair with a progress bar, and print the bundle's size, the time and the peak memory.

    Args:
        pair: target and drafter.
        output: bundle directory to write.
        options: options of the export.
        calibrate: whether to calibrate; None to do it if the target has matrices that are rounded and lie on no grid.
        texts: the user's texts to calibrate on; None for the default.
        kept: directory in which to keep what is finished, for a killed run to go on from; None to keep no texts.

    Returns:
        The document that `export --json` prints.

    Raises:
        InputError: see `exporter.bundle.export.export_bundle`.
    """
    from exporter.bundle.export import export_bundle
    from exporter.calibration.calibrate import few_tokens_warning
    from exporter.calibration.fold import foldable
    from exporter.graphs.backend import load_backend
    from exporter.graphs.grids import grid_warnings, off_grid
    from exporter.graphs.parts import graph_parts
    from exporter.texts.token_texts import kept_texts

    load_backend(options.backend)  # a missing package is told before anything else
    parts, total = graph_parts(pair, options.recipe), pair.weight_bytes
    calibrated, folded = {}, {}
    if calibrate is not False:
        calibrated, folded = off_grid(parts["target"]), foldable(parts["target"])
    warnings = [*pair.warnings, *grid_warnings(parts, options.recipe.name, calibrate is not False)]
    if options.chat and options.chat.tools and not options.chat.has_tools:
        warnings.append(
            f"{pair.target_checkpoint.directory}: the chat template's prompts with these tools have no form without"
            " Jinja; apps that have no Jinja cannot offer them"
        )
    if pair.activation_scales and not pair.rounds_activations:
        warnings.append(
            f"{pair.target_checkpoint.directory}: was trained with {len(pair.activation_scales)} scales of activations;"
            " the runtime rounds inputs by their own range instead; --activations checkpoint does what was trained"
        )
    started = time.perf_counter()
    if calibrated or folded:
        shapes = {name: parts["target"].shapes[name] for name in calibrated}
        if texts is None:
            texts = kept_texts(kept and kept / "texts.json", pair, partial(texts_to_fit, pair))
        if few := few_tokens_warning(parts["target"], calibrated, texts):
            warnings.append(few)
        options = replace(options, calibration=texts)
        what = f"{len(calibrated)} matrices" if calibrated else f"the inputs of {len(folded)} sites"
        err.print(f"calibrating {what} on {texts.num_tokens} tokens: {texts.source}")
        total += sum(4 * prod(shape) for shape in shapes.values())
    for warning in warnings:
        err.print(f"warning: {warning}", style="yellow")
    if calibrate and not (calibrated or folded):
        err.print("nothing to calibrate: no matrix of the target is rounded without lying on the grid of its bits")
    with progress_bar(err, "export", total) as progress:
        digest = export_bundle(pair, output, options, progress)
    size = directory_bytes(output)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    err.print(f"exported {output} ({human_bytes(size)}) in {seconds:.0f} s, peak memory {human_bytes(peak)}")
    err.print(f"digest of its manifest: {digest}")
    return {
        "bundle": str(output),
        "digest": digest,
        "recipe": options.recipe.name,
        "bytes": size,
        "seconds": seconds,
        "peak_bytes": peak,
        "calibrated": sorted(calibrated),
        "folded": _folded(output),
        "warnings": warnings,
    }
