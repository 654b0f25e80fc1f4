"""The command `recipe`, which measures what bits cost and chooses widths for a number of bytes."""

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from exporter.cli.cluster_command import check_files, texts_to_fit
from exporter.cli.options import BYTES, OR_ID, PATH, adapter_option, backend_option, calibration_options, json_option
from exporter.files import human_bytes, keeping, write_file
from exporter.heads.recall_plot import FORMATS
from exporter.quantization.recipes import RECIPES
from exporter.terminal import err, out, print_json, progress_bar

if TYPE_CHECKING:
    from exporter.calibration.choice import Bits, Choice
    from exporter.checkpoint.pair import Pair
    from exporter.texts.token_texts import TokenTexts


@click.command()
@click.option("--target", type=PATH, required=True, help=f"Checkpoint directory of Gemma 4 E2B or E4B, {OR_ID}.")
@click.option("--drafter", type=PATH, required=True, help="Checkpoint directory of its MTP drafter, or its id.")
@adapter_option
@backend_option
@click.option("--target-bytes", type=BYTES, help="Maximum size of a bundle, such as `2.2e9`: choose widths for it.")
@calibration_options
@click.option("--output", type=PATH, help="File to write the chosen recipe to, for `export --recipe`.")
@click.option(
    "--report", type=PATH, help=f"Image of bits against KL to write; its name ends in {' or '.join(FORMATS)}."
)
@click.option("--force", is_flag=True, help="Replace existing files.")
@json_option
def recipe(
    target: Path,
    drafter: Path,
    adapters: tuple[Path, ...],
    backend: str,
    target_bytes: int | None,
    calibrate: bool | None,
    calibration: Path | None,
    output: Path | None,
    report: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what bits cost each class of matrices, and choose widths for a number of bytes.

    The cost is the divergence (KL) of the next token that rounding a class alone causes, on held-out texts. The chosen
    recipe is a file of rules, to keep and to edit; without --output it is printed. With --output or --report, a run
    that was killed goes on where it was, by what `.NAME.kept` beside that file holds until it is written.
    """
    from exporter.checkpoint.hub import local_checkpoint
    from exporter.checkpoint.pair import open_pair
    from exporter.texts.token_texts import token_texts

    if output is not None and target_bytes is None:
        raise click.UsageError("--output writes the recipe that is chosen for --target-bytes; give both")
    check_files(output, report, force)
    target, drafter, *merged = map(local_checkpoint, (target, drafter, *adapters))
    pair = open_pair(target, drafter, adapter_dirs=merged)
    texts = None if calibration is None else token_texts(pair, calibration)
    refuse_too_few(pair, backend, target_bytes)
    written = output or report
    with contextlib.nullcontext() if written is None else keeping(written) as kept:
        bits, _ = measure_bits(pair, backend, True if calibration else calibrate, texts, kept)
        chosen = None if target_bytes is None else bits.choose(target_bytes)
        rules = None if chosen is None else chosen.recipe("chosen").toml()
        if report is not None:
            from exporter.calibration.bits_plot import bits_picture

            write_file(report, bits_picture(bits, chosen, report))
        if output is not None and rules is not None:
            write_file(output, rules.encode())
    if as_json:
        found = None if chosen is None else {"bytes": chosen.bytes, "kl": chosen.kl, "rules": rules}
        print_json("recipe", {**bits.as_dict(), "chosen": found})
        return
    out.print(bits_table(bits, chosen))
    out.print(choices_table(bits, chosen))
    if rules is not None and output is None:
        click.echo(rules, nl=False)


def refuse_too_few(pair: "Pair", backend_name: str, target_bytes: int | None) -> None:
    """Check before minutes of measuring that some choice is as small; None is no limit.

    Raises:
        InputError: none is, or the target's bits cannot be chosen.
    """
    from exporter.calibration.bit_costs import check_measurable, smallest_bytes
    from exporter.calibration.choice import too_few
    from exporter.graphs.backend import load_backend
    from exporter.graphs.bundle_bytes import bytes_beside_matrices

    check_measurable(pair)
    backend = load_backend(backend_name)
    smallest = bytes_beside_matrices(pair, backend, RECIPES["int4"]) + smallest_bytes(pair, backend)
    if target_bytes is not None and target_bytes < smallest:
        raise too_few(target_bytes, smallest)


def measure_bits(
    pair: "Pair", backend_name: str, calibrate: bool | None, texts: "TokenTexts | None", kept: Path | None
) -> "tuple[Bits, TokenTexts | None]":
    """Measure with a progress bar what bits cost a target.

    Args:
        pair: target and drafter.
        backend_name: a key of `exporter.graphs.backend.BACKENDS`.
        calibrate: whether to calibrate matrices of 4 bits; None to do it if some lie on no grid.
        texts: the user's texts to calibrate on; None for the default.
        kept: directory in which to keep how far it is, for a killed run to go on from; None to keep nothing.

    Returns:
        What bits cost, and the texts that were calibrated on.

    Raises:
        InputError: see `exporter.calibration.bit_costs.measure_costs`.
    """
    from exporter.calibration.bit_costs import bytes_to_measure, measure_costs, memory_to_measure
    from exporter.calibration.calibrate import few_tokens_warning
    from exporter.calibration.choice import Bits
    from exporter.calibration.fold import fold, foldable
    from exporter.graphs.backend import load_backend
    from exporter.graphs.bundle_bytes import bytes_beside_matrices
    from exporter.graphs.grids import off_grid
    from exporter.graphs.parts import graph_parts
    from exporter.memory import available_memory
    from exporter.texts.token_texts import HELD_OUT_TOKENS, held_out_texts, kept_texts

    backend, int4 = load_backend(backend_name), RECIPES["int4"]
    part = graph_parts(pair, int4)["target"]
    widths = {} if calibrate is False else off_grid(part)
    calibrate = bool(widths) if calibrate is None else calibrate
    if calibrate:
        if texts is None:
            texts = kept_texts(kept and kept / "texts.json", pair, partial(texts_to_fit, pair))
        if few := few_tokens_warning(part, widths, texts):
            err.print(f"warning: {few}", style="yellow")
        if sites := foldable(part):
            with progress_bar(err, "inputs", pair.target.num_hidden_layers) as progress:
                pair = fold(pair, sites, texts, lambda step, _: progress(step, 1))
        available, needed = available_memory(), memory_to_measure(pair, texts.num_tokens)
        if available is not None and needed > available:
            free = human_bytes(available)
            err.print(f"warning: needs about {human_bytes(needed)} of memory, {free} are free", style="yellow")
    with progress_bar(err, "held-out texts", HELD_OUT_TOKENS) as progress:
        held_out = kept_texts(kept and kept / "held-out.json", pair, partial(held_out_texts, pair, progress))
    with progress_bar(err, "bits", bytes_to_measure(pair)) as progress:
        used = texts if calibrate else None
        costs, positions = measure_costs(pair, backend, held_out, used, progress, kept and kept / "bits")
    other_bytes = bytes_beside_matrices(pair, backend, int4)
    return Bits(tuple(costs), other_bytes, positions, held_out.source, None if used is None else used.source), used


def bits_table(bits: "Bits", chosen: "Choice | None") -> Table:
    """Return a table of what each class costs in each width, in which the chosen widths are marked."""
    how = "rounded to the nearest" if bits.texts is None else f"4 bits calibrated on {bits.texts}"
    table = Table(title=f"One class rounded, {how}; {bits.positions} positions: {bits.held_out}")
    for heading in ("matrices", "width"):
        table.add_column(heading)
    for heading in ("bytes", "KL, nats", "kept choices"):
        table.add_column(heading, justify="right")
    for cost in bits.costs:
        style = "bold green" if chosen is not None and cost in chosen.costs else None
        mark = "chosen " if style else ""
        cells = mark + str(cost.width), human_bytes(cost.bytes), f"{cost.kl:.5f}", f"{cost.choices_kept:.1%}"
        table.add_row(cost.matrices, *cells, style=style)
    return table


def choices_table(bits: "Bits", chosen: "Choice | None") -> Table:
    """Return a table of the named recipes, the chosen one and the smallest and largest of the best choices."""
    table = Table("bundle", title="Sums of the classes, with the drafter in 8 and 4 bits")
    for heading in ("bytes", "KL, nats"):
        table.add_column(heading, justify="right")
    best = bits.choices()
    rows = {"smallest choice": best[0], **bits.named(), "largest choice": best[-1]}
    for name, choice in {**rows, **({} if chosen is None else {"chosen": chosen})}.items():
        table.add_row(name, human_bytes(choice.bytes), f"{choice.kl:.5f}")
    return table
