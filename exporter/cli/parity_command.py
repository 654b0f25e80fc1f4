"""`parity`: prove a bundle."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from exporter.checkpoint.pair import Pair
from exporter.cli.options import bundle_argument, json_option, prompt_ids_option, source_options
from exporter.parity.stages import Check, open_source, run_parity
from exporter.terminal import err, out
from runtime_ref.errors import CheckError
from runtime_ref.prompts import read_prompt_ids


def parity_table(checks: Sequence[Check]) -> Table:
    """One row a check, the largest error beside its tolerance."""
    table = Table("stage", "output", "", "result", title="Parity")
    for check in checks:
        verdict = Text("PASS", "green") if check.passed else Text("FAIL", "bold red")
        error = "" if check.error is None else f"{check.error:.1e} (allowed {check.tolerance:.0e})"
        table.add_row(check.stage, check.output, verdict, error or check.detail)
    return table


@click.command()
@bundle_argument
@source_options(required=False)
@prompt_ids_option("seeded random ids")
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
    pair = source_if_given(bundle, target, drafter)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    checks = check_parity(bundle, pair, prompts, max_new_tokens)
    if as_json:
        click.echo(json.dumps({"passed": all(c.passed for c in checks), "checks": [c.as_dict() for c in checks]}))
    else:
        out.print(parity_table(checks))
        if pair is None:
            err.print("Without --target and --drafter, only the files and losslessness were checked.")
    require_passed(checks)


def source_if_given(bundle: Path, target: Path | None, drafter: Path | None) -> Pair | None:
    """The checkpoints of a bundle, for commands that can do without."""
    if (target is None) != (drafter is None):
        raise click.UsageError("give both --target and --drafter, or neither")
    return None if target is None or drafter is None else open_source(bundle, target, drafter)


def check_parity(bundle: Path, pair: Pair | None, prompts: list[list[int]], max_new_tokens: int) -> list[Check]:
    with err.status("parity") as status:
        return run_parity(bundle, pair, prompts, max_new_tokens, lambda stage: status.update(f"parity: {stage}"))


def require_passed(checks: list[Check]) -> None:
    failed = [check for check in checks if not check.passed]
    if failed:
        raise CheckError(f"parity: {len(failed)} of {len(checks)} checks, first {failed[0].stage} / {failed[0].output}")
    err.print(f"parity: all {len(checks)} checks passed", style="green")
