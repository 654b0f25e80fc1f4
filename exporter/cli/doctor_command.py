"""The command `doctor`, which finds out why few drafts are accepted."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Column, Table
from rich.text import Text

from exporter.cli.options import PATH, bundle_argument, json_option, prompt_ids_option, source_options
from exporter.terminal import err, out, print_json
from runtime_ref.errors import CheckError
from runtime_ref.prompts import read_prompt_ids

if TYPE_CHECKING:
    from exporter.doctor.diagnosis import Diagnosis

VERDICTS = {"pass": ("PASS", "green"), "finding": ("FINDING", "bold red"), "skipped": ("skipped", "dim")}


def doctor_table(diagnosis: "Diagnosis") -> Table:
    """Return a table with a row for each experiment of a diagnosis."""
    title = "Known causes of a low acceptance rate"
    if diagnosis.acceptance_rate is not None:
        title += f"; in this test {diagnosis.acceptance_rate:.1%} of drafts are accepted"
    table = Table("experiment", "verdict", Column("details", overflow="fold"), title=title)
    for experiment in diagnosis.experiments:
        table.add_row(experiment.experiment, Text(*VERDICTS[experiment.verdict]), experiment.detail)
    return table


@click.command()
@bundle_argument
@source_options(required=True)
@click.option(
    "--base",
    type=PATH,
    help="Checkpoint directory of the target before it was trained further, or its id: tells whether less is accepted.",
)
@prompt_ids_option("texts that the target generates")
@click.option("--max-new-tokens", type=click.IntRange(8), default=64, help="Maximum number of new tokens in each text.")
@json_option
def doctor(
    bundle: Path,
    target: Path,
    drafter: Path,
    adapters: tuple[Path, ...],
    base: Path | None,
    prompt_ids: Path | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Find out why few drafts are accepted, with an experiment for each known cause.

    Each experiment runs the checkpoints in eager torch with one known fault, such as an outdated KV cache, and compares
    the result with the bundle. The exit code is 1 if there is a finding.
    """
    from exporter.checkpoint.hub import local_checkpoint
    from exporter.doctor.diagnosis import run_doctor
    from exporter.doctor.drafter_fit import base_pair
    from exporter.parity.source import open_source

    target, drafter, *merged = map(local_checkpoint, (target, drafter, *adapters))
    pair = open_source(bundle, target, drafter, merged)
    before = None if base is None else base_pair(pair, local_checkpoint(base))
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    with err.status("doctor") as status:
        diagnosis = run_doctor(bundle, pair, prompts, max_new_tokens, lambda s: status.update(f"doctor: {s}"), before)
    findings = diagnosis.findings
    if as_json:
        experiments = [
            {"experiment": e.experiment, "verdict": e.verdict, "detail": e.detail, **e.figures}
            for e in diagnosis.experiments
        ]
        document = {
            "findings": len(findings),
            "acceptance_rate": diagnosis.acceptance_rate,
            "gain": diagnosis.gain and asdict(diagnosis.gain),
            "experiments": experiments,
        }
        print_json("doctor", document)
    else:
        out.print(doctor_table(diagnosis))
    if diagnosis.gain is not None:
        err.print(f"doctor: {diagnosis.gain}")
    if findings:
        number = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        raise CheckError(f"doctor: {number}, most likely {findings[0].experiment}: {findings[0].detail}")
    err.print(f"doctor: none of {len(diagnosis.experiments)} experiments found a cause", style="green")
