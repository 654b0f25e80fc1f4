"""`report`: one HTML page about a bundle."""

import json
from pathlib import Path

import click

from exporter.cli.options import PATH, bundle_argument, json_option, prompt_ids_option, source_options, threads_option
from exporter.cli.parity_command import require_passed, source_if_given
from exporter.files import check_file, write_file
from exporter.report.content import ReportOptions, checks_of, measure_report
from exporter.report.page import render
from exporter.terminal import err
from runtime_ref.prompts import read_prompt_ids


@click.command()
@bundle_argument
@click.option("--output", type=PATH, required=True, help="HTML file to write.")
@source_options(required=False)
@prompt_ids_option("openings that the target generates")
@click.option("--max-new-tokens", type=click.IntRange(1), default=ReportOptions.max_new_tokens)
@threads_option
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@json_option
def report(
    bundle: Path,
    output: Path,
    target: Path | None,
    drafter: Path | None,
    prompt_ids: Path | None,
    max_new_tokens: int,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure a bundle and write one HTML page about it: drafts, speed, memory, parity."""
    check_file(output, force)
    pair = source_if_given(bundle, target, drafter)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    options = ReportOptions(threads, max_new_tokens)
    with err.status("report") as status:
        facts = measure_report(bundle, pair, prompts, options, lambda step: status.update(f"report: {step}"))
    write_file(output, render(facts).encode())
    if as_json:
        click.echo(json.dumps(facts))
    err.print(f"wrote {output}")
    require_passed(checks_of(facts))
