"""Commands that take a bundle: generate, parity, bench. They read arguments, call the library, print."""

import json
from pathlib import Path

import click

from exporter.bench.bundle import BenchOptions, check_same_text, measure_bundle
from exporter.console import bench_tables, err, out, parity_table, progress_bar, stats_line
from exporter.options import DIRECTORY, DraftTokens, bench_options, json_option
from exporter.pair import Pair
from exporter.parity import Check, open_source, run_parity
from runtime_ref.decoder import Options
from runtime_ref.decoder import generate as generate_tokens
from runtime_ref.engine import Engine, open_engine
from runtime_ref.errors import CheckError, InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.prompts import read_prompt_ids
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer


@click.command()
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
    engine = open_bundle(bundle)
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
            speak(engine, tokenizer, ids, options)
            continue
        stats = Stats()
        tokens = list(generate_tokens(engine, ids, options, stats))
        text = tokenizer.decode(tokens) if tokenizer else None
        results.append({"tokens": tokens, "text": text, **stats.as_dict()})
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
    if (target is None) != (drafter is None):
        raise click.UsageError("give both --target and --drafter, or neither")
    pair = None
    if target is not None and drafter is not None:
        pair = open_source(bundle, target, drafter)
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


def open_bundle(bundle: Path) -> Engine:
    with progress_bar(err, "checking files", sum(size for size, _ in read_manifest(bundle).files.values())) as progress:
        return open_engine(bundle, progress=progress)


def speak(engine: Engine, tokenizer: TextTokenizer | None, prompt: list[int], options: Options) -> None:
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


def check_parity(bundle: Path, pair: Pair | None, prompts: list[list[int]], max_new_tokens: int) -> list[Check]:
    with err.status("parity") as status:
        return run_parity(bundle, pair, prompts, max_new_tokens, lambda rung: status.update(f"parity: {rung}"))


def verdict(checks: list[Check]) -> None:
    failed = [check for check in checks if not check.passed]
    if failed:
        raise CheckError(f"parity: {len(failed)} of {len(checks)} checks, first {failed[0].rung} / {failed[0].output}")
    err.print(f"parity: all {len(checks)} checks passed", style="green")
