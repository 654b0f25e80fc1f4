"""The command `generate`, which generates text with a bundle."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.options import DraftTokens, bundle_argument, json_option, prompt_ids_option
from exporter.terminal import err, progress_bar
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.prompts import read_prompt_ids

if TYPE_CHECKING:
    from runtime_ref.streaming import Decoder

FROM_CHECKPOINT = "the checkpoint's"


@click.command()
@bundle_argument
@click.option("--prompt", help="Text to continue.")
@click.option(
    "--chat",
    is_flag=True,
    help="Answer the prompt as the first message of a chat, with the checkpoint's chat template.",
)
@prompt_ids_option()
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, help="Maximum number of new tokens for each prompt."
)
@click.option(
    "--mode",
    type=click.Choice(["speculative", "plain"]),
    default="speculative",
    help="Decoding with draft tokens or without. Both generate the same tokens.",
)
@click.option(
    "--num-draft-tokens",
    type=DraftTokens(),
    default="auto",
    help="Draft tokens in a round. `auto` chooses the number before each round by measured speed, and may choose 0.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    help="Sampling temperature; 0 is greedy decoding.",
    show_default=FROM_CHECKPOINT,
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most probable tokens that have this total probability.",
    show_default=FROM_CHECKPOINT,
)
@click.option(
    "--top-k",
    type=int,
    help="Sample from this number of most probable tokens, 1 to 64.",
    show_default=FROM_CHECKPOINT,
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Seed of sampling.")
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
    """Generate text with a bundle: continue a prompt, or chat.

    Without --prompt, --prompt-ids and --json, and with a terminal as standard input, it starts a chat, or continues
    each line by itself if the bundle has no chat template. With several prompts, --json prints a list.
    """
    from exporter.cli.conversation import converse
    from exporter.cli.printing import print_continuation, print_stream
    from runtime_ref.chat import NO_TEMPLATE, Message

    interactive = prompt is None and prompt_ids is None and not as_json and sys.stdin.isatty()
    if (prompt is None) == (prompt_ids is None) and not interactive:
        raise click.UsageError("give either --prompt or --prompt-ids")
    if chat and prompt_ids is not None:
        raise click.UsageError("--chat cannot be used with --prompt-ids; give --prompt instead")
    if prompt == "":
        raise InputError("the prompt is empty: expected some text")
    decoder = open_bundle(bundle)
    if chat and decoder.template is None:
        raise InputError(f"{bundle}: {NO_TEMPLATE}")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": 0 if mode == "plain" else num_draft_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if interactive:
        converse(decoder, options)
        return
    prompts: list[Any] = [prompt] if prompt_ids is None else list(read_prompt_ids(prompt_ids))
    results = []
    for item in prompts:
        decoder.forget()  # so that every prompt of a file is measured from its first token on
        messages: list[Message] = [{"role": "user", "content": item}]
        stream = decoder.chat(messages, **options) if chat else decoder.stream(item, **options)
        if not as_json:
            print_stream(stream) if chat else print_continuation(decoder, stream)
            continue
        for _ in stream:
            pass
        text = stream.text if decoder.tokenizer else None
        results.append({"tokens": stream.tokens, "text": text, **stream.stats.as_dict()})
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else results))


def open_bundle(bundle: Path) -> "Decoder":
    """Open a bundle for generation, with a progress bar while its files are checked.

    Args:
        bundle: bundle directory.

    Raises:
        InputError: the directory is not a bundle, or the bundle cannot be loaded.
    """
    from runtime_ref.streaming import open_decoder

    with progress_bar(err, "checking files", sum(size for size, _ in read_manifest(bundle).files.values())) as progress:
        return open_decoder(bundle, progress=progress)
