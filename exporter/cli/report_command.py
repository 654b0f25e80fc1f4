"""The command `report`, which writes an HTML page about a bundle."""

from pathlib import Path

import click

from exporter.cli.options import PATH, bundle_argument, json_option, prompt_ids_option, source_options, threads_option
from exporter.cli.parity_command import require_passed, source_if_given
from exporter.files import check_file, write_file
from exporter.terminal import err, print_json
from runtime_ref.prompts import read_prompt_ids


@click.command()
@bundle_argument
@click.option("--output", type=PATH, required=True, help="HTML file to write.")
@source_options(required=False)
@prompt_ids_option("beginnings of texts that the target generates")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    help="Maximum number of new tokens for each prompt.",
)
@threads_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def report(
    bundle: Path,
    output: Path,
    target: Path | None,
    drafter: Path | None,
    adapters: tuple[Path, ...],
    prompt_ids: Path | None,
    max_new_tokens: int,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure a bundle and write an HTML page about it: drafts, speed, memory, parity.

    With --target and --drafter it checks all stages of parity and measures the recall of the clusters; without them it
    checks what `parity` checks without them. The exit code is 1 if a check of parity fails.
    """
    from exporter.report.content import ReportOptions, checks_of, measure_report
    from exporter.report.page import render

    check_file(output, force)
    pair = source_if_given(bundle, target, drafter, adapters)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    options = ReportOptions(threads, max_new_tokens)
    with err.status("report") as status:
        document = measure_report(bundle, pair, prompts, options, lambda step: status.update(f"report: {step}"))
    write_file(output, render(document).encode())
    if as_json:
        print_json("report", document)
    err.print(f"wrote {output}")
    require_passed(checks_of(document))
