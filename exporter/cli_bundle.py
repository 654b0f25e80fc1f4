"""Commands that take a bundle. They read arguments, call the library, print."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from exporter.bench.bundle import BenchOptions, check_same_text, measure_bundle
from exporter.chat import converse, show
from exporter.console import bench_tables, doctor_table, err, out, parity_table, progress_bar
from exporter.doctor.diagnosis import run_doctor
from exporter.files import check_file, write_file
from exporter.options import DIRECTORY, DraftTokens, bench_options, json_option
from exporter.pair import Pair
from exporter.parity import Check, open_source, run_parity
from exporter.report import ReportOptions, checks_of, measure_report, render
from runtime_ref.chat import NO_TEMPLATE
from runtime_ref.errors import CheckError, InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.prompts import read_prompt_ids
from runtime_ref.streaming import Decoder, Stream, open_decoder


@click.command()
@click.argument("bundle", type=DIRECTORY)
@click.option("--prompt", help="Text to continue.")
@click.option("--chat", is_flag=True, help="Answer the prompt as a chat's first message, by the checkpoint's template.")
@click.option("--prompt-ids", type=DIRECTORY, help="JSON file: a list of token ids, or a list of such lists.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@click.option("--mode", type=click.Choice(["speculative", "plain"]), default="speculative")
@click.option(
    "--num-draft-tokens",
    type=DraftTokens(),
    default="auto",
    help="Drafts a round; auto is as many as pay, none included.",
)
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy.  [default: the checkpoint's]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="[default: the checkpoint's]")
@click.option("--top-k", type=int, help="At most 64.  [default: the checkpoint's]")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0)
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    prompt_ids: Path | None,
    max_new_tokens: int,
    mode: str,
    num_draft_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Continue prompts with a bundle; without a prompt, on a terminal, chat."""
    interactive = prompt is None and prompt_ids is None and not as_json and sys.stdin.isatty()
    if (prompt is None) == (prompt_ids is None) and not interactive:
        raise click.UsageError("give either --prompt or --prompt-ids")
    if chat and prompt_ids is not None:
        raise click.UsageError("--chat goes with --prompt: token ids are run as they are")
    if prompt == "":
        raise InputError("the prompt is empty: expected some text")
    decoder = open_bundle(bundle)
    if chat and decoder.template is None:
        raise InputError(f"{bundle}: {NO_TEMPLATE}")
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": 0 if mode == "plain" else num_draft_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if interactive:
        converse(decoder, given)
        return
    prompts: list[Any] = [prompt] if prompt_ids is None else list(read_prompt_ids(prompt_ids))
    results = []
    for item in prompts:
        decoder.forget()  # prompts of a file are measured alike, whatever they share
        stream = decoder.chat([{"role": "user", "content": item}], **given) if chat else decoder.stream(item, **given)
        if not as_json:
            show(stream) if chat else speak(decoder, stream)
            continue
        for _ in stream:
            pass
        text = stream.text if decoder.tokenizer else None
        results.append({"tokens": stream.tokens, "text": text, **stream.stats.as_dict()})
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else results))


@click.command()
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
    pair = source_if_given(bundle, target, drafter)
    prompts = read_prompt_ids(prompt_ids) if prompt_ids else []
    checks = check_parity(bundle, pair, prompts, max_new_tokens)
    if as_json:
        click.echo(json.dumps({"passed": all(c.passed for c in checks), "checks": [vars(c) for c in checks]}))
    else:
        out.print(parity_table(checks))
        if pair is None:
            err.print("Without --target and --drafter, only the files and losslessness were checked.")
    verdict(checks)


@click.command()
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


@click.command()
@click.argument("bundle", type=DIRECTORY)
@click.option("--output", type=DIRECTORY, required=True, help="HTML file to write.")
@click.option("--target", type=DIRECTORY, help="The checkpoint it was exported from; needs --drafter.")
@click.option("--drafter", type=DIRECTORY, help="The drafter it was exported from; needs --target.")
@click.option("--prompt-ids", type=DIRECTORY, help="JSON file of token ids to continue, else made-up openings.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=ReportOptions.max_new_tokens)
@click.option("--threads", type=click.IntRange(1), help="Threads inside an operation.  [default: one for each CPU]")
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
    verdict(checks_of(facts))


def open_bundle(bundle: Path) -> Decoder:
    """Load a bundle, with a progress bar while its files are checked."""
    with progress_bar(err, "checking files", sum(size for size, _ in read_manifest(bundle).files.values())) as progress:
        return open_decoder(bundle, progress=progress)


def source_if_given(bundle: Path, target: Path | None, drafter: Path | None) -> Pair | None:
    """The checkpoints of a bundle, for commands that can do without."""
    if (target is None) != (drafter is None):
        raise click.UsageError("give both --target and --drafter, or neither")
    return None if target is None or drafter is None else open_source(bundle, target, drafter)


def speak(decoder: Decoder, stream: Stream) -> None:
    """Print a prompt and its continuation as it comes, as text if there is a tokenizer, else as ids."""
    if decoder.tokenizer:
        click.secho(decoder.tokenizer.decode(stream.prompt), dim=True, nl=False)
    show(stream, as_text=decoder.tokenizer is not None)


def check_parity(bundle: Path, pair: Pair | None, prompts: list[list[int]], max_new_tokens: int) -> list[Check]:
    with err.status("parity") as status:
        return run_parity(bundle, pair, prompts, max_new_tokens, lambda rung: status.update(f"parity: {rung}"))


def verdict(checks: list[Check]) -> None:
    failed = [check for check in checks if not check.passed]
    if failed:
        raise CheckError(f"parity: {len(failed)} of {len(checks)} checks, first {failed[0].rung} / {failed[0].output}")
    err.print(f"parity: all {len(checks)} checks passed", style="green")


@click.command()
@click.argument("bundle", type=DIRECTORY)
@click.option("--target", type=DIRECTORY, required=True, help="The checkpoint it was exported from.")
@click.option("--drafter", type=DIRECTORY, required=True, help="The drafter it was exported from.")
@click.option(
    "--prompt-ids",
    type=DIRECTORY,
    help="JSON file: a list of token ids, or a list of such lists.  [default: what the target writes by itself]",
)
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
