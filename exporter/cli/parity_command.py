"""The command `parity`, which checks a bundle, and what other commands share with it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from exporter.cli.options import BYTES, PATH, Number, bundle_argument, json_option, prompt_ids_option, source_options
from exporter.terminal import err, out, print_json
from runtime_ref.errors import CheckError
from runtime_ref.prompts import read_prompt_ids

if TYPE_CHECKING:
    from exporter.checkpoint.pair import Pair
    from exporter.parity.checks import Check
    from exporter.parity.gate import Figures, Gate


def parity_table(checks: "Sequence[Check]") -> Table:
    """Return a table with a row for each check: its largest error and the tolerance, or details."""
    table = Table("stage", "output", "", "result", title="Parity")
    for check in checks:
        verdict = Text("PASS", "green") if check.passed else Text("FAIL", "bold red")
        table.add_row(check.stage, check.output, verdict, check.result)
    return table


@click.command()
@bundle_argument
@source_options(required=False)
@prompt_ids_option("random ids, always the same")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=32, help="Maximum number of new tokens for each prompt."
)
@click.option(
    "--min-choices",
    type=Number(0, 1),
    help="Least share of positions at which bundle and checkpoint choose the same token; needs --target and --drafter.",
)
@click.option("--min-acceptance", type=Number(0, 1), help="Least share of draft tokens that are accepted.")
@click.option(
    "--max-kl",
    type=Number(0),
    help="Largest mean KL divergence from the checkpoint, in nats; needs --target and --drafter.",
)
@click.option("--max-bundle-bytes", type=BYTES, help="Largest size of the bundle, such as `2.5e9`.")
@click.option("--junit", type=PATH, help="File to write the checks to as JUnit XML; one of an earlier run is replaced.")
@json_option
def parity(
    bundle: Path,
    target: Path | None,
    drafter: Path | None,
    adapters: tuple[Path, ...],
    prompt_ids: Path | None,
    max_new_tokens: int,
    min_choices: float | None,
    min_acceptance: float | None,
    max_kl: float | None,
    max_bundle_bytes: int | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Check a bundle: files, weights, outputs of the graphs, plain and speculative tokens.

    With --target and --drafter, weights are compared with the checkpoints, and outputs with the same model in eager
    torch. Without them it checks only that the files match the manifest, and that speculative decoding generates the
    same tokens as plain decoding. What a recipe costs is measured, and judged by the limits that are given. The exit
    code is 1 if a check fails or a limit is not kept.
    """
    from exporter.parity.gate import Gate
    from exporter.parity.junit import check_junit, write_junit

    gate = Gate(min_choices, min_acceptance, max_kl, max_bundle_bytes)
    if gate.needs_checkpoints and (target is None or drafter is None):
        raise click.UsageError("--min-choices and --max-kl compare with the checkpoints; give --target and --drafter")
    if junit is not None:
        check_junit(junit)
    pair = source_if_given(bundle, target, drafter, adapters)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    checks, figures = check_parity(bundle, pair, prompts, max_new_tokens, gate)
    if junit is not None:
        write_junit(junit, bundle, checks)
    if as_json:
        passed = all(check.passed for check in checks)
        print_json("parity", {"passed": passed, "figures": figures, "checks": [check.as_dict() for check in checks]})
    else:
        out.print(parity_table(checks))
        if pair is None:
            err.print("Without --target and --drafter, only the files and the speculative tokens were checked.")
    require_passed(checks)


def source_if_given(
    bundle: Path, target: Path | None, drafter: Path | None, adapters: tuple[Path, ...] = ()
) -> "Pair | None":
    """Open the checkpoints that a bundle was exported from, for commands where they are optional.

    Args:
        bundle: bundle directory.
        target: the target's checkpoint directory, or None.
        drafter: the drafter's checkpoint directory, or None.
        adapters: directories of adapters that were merged into the target.

    Returns:
        The pair, or None if neither checkpoint is given.

    Raises:
        UsageError: only one of the two is given, or adapters without them.
        InputError: bundle or checkpoints cannot be read.
    """
    if (target is None) != (drafter is None):
        raise click.UsageError("give both --target and --drafter, or neither")
    if adapters and target is None:
        raise click.UsageError("--adapter belongs to a target; give --target and --drafter")
    if target is None or drafter is None:
        return None
    from exporter.checkpoint.hub import local_checkpoint
    from exporter.parity.source import open_source

    target, drafter, *merged = map(local_checkpoint, (target, drafter, *adapters))
    return open_source(bundle, target, drafter, merged)


def check_parity(
    bundle: Path, pair: "Pair | None", prompts: list[list[int]], max_new_tokens: int, gate: "Gate"
) -> "tuple[list[Check], Figures]":
    """Run `exporter.parity.stages.measure_parity`, showing the current stage on a terminal."""
    from exporter.parity.stages import measure_parity

    with err.status("parity") as status:
        note: Callable[[str], None] = lambda stage: status.update(f"parity: {stage}")  # noqa: E731
        return measure_parity(bundle, pair, prompts, max_new_tokens, gate, note)


def require_passed(checks: "list[Check]") -> None:
    """Print that all checks passed.

    Raises:
        CheckError: a check failed.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        first = failed[0]
        raise CheckError(f"parity: {len(failed)} of {len(checks)} checks failed, first {first.stage} / {first.output}")
    err.print(f"parity: all {len(checks)} checks passed", style="green")
