"""`doctor`: why few drafts are accepted."""

import json
from pathlib import Path

import click
from rich.table import Column, Table
from rich.text import Text

from exporter.cli.options import bundle_argument, json_option, prompt_ids_option, source_options
from exporter.doctor.diagnosis import Diagnosis, run_doctor
from exporter.parity.stages import open_source
from exporter.terminal import err, out
from runtime_ref.errors import CheckError
from runtime_ref.prompts import read_prompt_ids

VERDICTS = {"pass": ("PASS", "green"), "finding": ("FINDING", "bold red"), "skipped": ("skipped", "dim")}


def doctor_table(diagnosis: Diagnosis) -> Table:
    """One row an experiment."""
    title = "Why is acceptance low?"
    if diagnosis.acceptance_rate is not None:
        title += f" The bundle accepts {diagnosis.acceptance_rate:.1%} of its drafts here"
    table = Table("experiment", "", Column("found", overflow="fold"), title=title)
    for found in diagnosis.experiments:
        table.add_row(found.experiment, Text(*VERDICTS[found.verdict]), found.detail)
    return table


@click.command()
@bundle_argument
@source_options(required=True)
@prompt_ids_option("what the target generates by itself")
@click.option("--max-new-tokens", type=click.IntRange(8), default=64, help="Of each text that is written.")
@json_option
def doctor(
    bundle: Path, target: Path, drafter: Path, prompt_ids: Path | None, max_new_tokens: int, as_json: bool
) -> None:
    """Find out why few drafts are accepted: an experiment for each known cause."""
    pair = open_source(bundle, target, drafter)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    with err.status("doctor") as status:
        found = run_doctor(bundle, pair, prompts, max_new_tokens, lambda step: status.update(f"doctor: {step}"))
    if as_json:
        experiments = [
            {"experiment": e.experiment, "verdict": e.verdict, "detail": e.detail, **e.figures}
            for e in found.experiments
        ]
        facts = {"findings": len(found.findings), "acceptance_rate": found.acceptance_rate, "experiments": experiments}
        click.echo(json.dumps(facts))
    else:
        out.print(doctor_table(found))
    if found.findings:
        first = found.findings[0]
        raise CheckError(f"doctor: {len(found.findings)} found, most likely {first.experiment}: {first.detail}")
    err.print(f"doctor: none of {len(found.experiments)} experiments found a cause", style="green")
