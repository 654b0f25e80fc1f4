"""The command `generate`, which generates text with a bundle."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.options import PATH, DraftTokens, bundle_argument, json_option, prompt_ids_option, utf8_text
from exporter.cli.rule_options import FROM_CHECKPOINT, rule_options, rules_of
from exporter.files import alone, check_file
from exporter.terminal import err, print_json, progress_bar
from runtime_ref.errors import InputError
from runtime_ref.full_context import SHIFT, STOP, WHEN_FULL
from runtime_ref.manifest import read_manifest
from runtime_ref.prompts import read_prompt_ids

if TYPE_CHECKING:
    from runtime_ref.streaming import Decoder


@click.command()
@bundle_argument
@click.option("--prompt", help="Text to continue; `-` reads it from standard input.")
@click.option("--prompt-file", type=PATH, help="File with the text to continue; a line break at its end is left out.")
@click.option(
    "--chat",
    is_flag=True,
    help="Answer the prompt as the first message of a chat, with the checkpoint's chat template.",
)
@click.option("--system", help="System prompt of a chat, if its template has room for one.")
@click.option(
    "--tools", type=PATH, help="JSON file with the tools that a chat may call: a list of functions with JSON Schemas."
)
@click.option("--strict-tools", is_flag=True, help="Let calls be only of these tools, with arguments as they ask for.")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Whether the model thinks before it answers in a chat.",
    show_default="the chat template's",
)
@prompt_ids_option()
@click.option(
    "--stop", multiple=True, help="Text that ends the answer and is no part of it; may be given several times."
)
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
    help="Draft tokens in a round. `auto` chooses the number before each round by measured speed, and may choose 0."
    " Not used with `--mode plain`.",
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
@click.option(
    "--session",
    type=PATH,
    help="File that the conversation goes on from, if it exists, and that it is saved in; what a prompt shares with it "
    "is not run again.",
)
@click.option(
    "--when-full",
    type=click.Choice(WHEN_FULL),
    help="Where the context is full: stop; or shift: go on without the oldest turns of a chat, or the oldest tokens of "
    "a text, and run the rest again. A text's prompt must fit into it.",
    show_default="shift in a chat on a terminal, else stop",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Seed of sampling.")
@rule_options
@click.option("--verify", is_flag=True, help="Check every file of the bundle, not only those that may have changed.")
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    tools: Path | None,
    strict_tools: bool,
    thinking: bool | None,
    prompt_ids: Path | None,
    stop: tuple[str, ...],
    max_new_tokens: int,
    mode: str,
    num_draft_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    session: Path | None,
    when_full: str | None,
    seed: int,
    verify: bool,
    as_json: bool,
    **rules: Any,
) -> None:
    """Generate text with a bundle: continue a prompt, or chat.

    Without a prompt and --json, and with a terminal as standard input, it starts a chat, or continues each message by
    itself if the bundle has no chat template. With several prompts, --json prints a list. With --session, a chat goes
    on with the messages that the file has.
    """
    from exporter.cli.printing import print_continuation, print_stream
    from exporter.cli.terminal_chat import converse, open_conversation, system_messages
    from runtime_ref.chat import NO_TEMPLATE, Message, read_tools
    from runtime_ref.decoder import check_prompts

    given = sum(source is not None for source in (prompt, prompt_file, prompt_ids))
    interactive = not given and not as_json and sys.stdin is not None and sys.stdin.isatty()
    if given != 1 and not interactive:
        raise click.UsageError(
            "give one of --prompt, --prompt-file and --prompt-ids; --prompt - is standard input, and a chat line by"
            " line needs a terminal"
        )
    if chat and prompt_ids is not None:
        raise click.UsageError("--chat cannot be used with --prompt-ids; give --prompt instead")
    of_chats = {"--system": system, "--tools": tools, "--thinking or --no-thinking": thinking}
    of_chats["--strict-tools"] = strict_tools or None
    given_of_chats = [option for option, value in of_chats.items() if value is not None]
    if given_of_chats and not chat and not interactive:
        raise click.UsageError(f"{given_of_chats[0]} goes with --chat")
    if prompt_ids is None and not interactive:
        prompt = read_prompt(prompt, prompt_file)
    if strict_tools and tools is None:
        raise click.UsageError("--strict-tools goes with --tools")
    if thinking is False and rules["thinking_budget"] is not None:
        raise click.UsageError("--no-thinking leaves no thoughts to limit; leave out --thinking-budget")
    prompts: list[Any] = [prompt] if prompt_ids is None else list(read_prompt_ids(prompt_ids))
    if session is not None:
        if len(prompts) > 1:
            raise click.UsageError(f"--session goes with one prompt, {prompt_ids} has {len(prompts)}")
        check_file(session, force=True)
        click.get_current_context().with_resource(alone(session))
    decoder = open_bundle(bundle, verify)
    if prompt_ids is not None:
        check_prompts(decoder.engine.manifest, prompts)
    if (chat or given_of_chats) and decoder.template is None:
        option = "--chat" if chat else given_of_chats[0]
        raise InputError(f"{bundle}: {NO_TEMPLATE.replace('--chat', option)}")
    start, functions = system_messages(decoder, system), read_tools(tools) if tools else None
    conversation = None if session is None else open_conversation(decoder, session, system)
    if conversation is not None and conversation.messages and not (chat or interactive):
        raise InputError(f"{session}: has a chat, which a text would replace; pass --chat, or choose another file")
    texts = conversation or decoder

    def save() -> None:
        if conversation is not None and session is not None and conversation.position:
            conversation.save(session)

    chat_options: dict[str, Any] = {"tools": functions, "strict_tools": strict_tools, "thinking": thinking}
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_draft_tokens": 0 if mode == "plain" else num_draft_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
        "when_full": when_full or (SHIFT if interactive and decoder.template else STOP),
        **rules_of(rules),
    }
    if interactive:
        try:
            converse(decoder, options, system, chat_options, conversation, save)
        finally:
            save()
        return
    results = []
    for item in prompts:
        decoder.forget()  # so that every prompt of a file is measured from its first token on
        earlier = start if conversation is None else conversation.messages or start
        messages: list[Message] = [*earlier, {"role": "user", "content": item}]
        stream = texts.chat(messages, **chat_options, **options) if chat else texts.stream(item, **options)
        try:
            if not as_json:
                print_stream(stream) if chat else print_continuation(decoder, stream)
            for _ in stream:
                pass
            if conversation is not None and chat:
                conversation.messages = [*messages, stream.message]
        finally:
            save()
        if not as_json:
            continue
        text = stream.text if decoder.tokenizer else None
        calls = [asdict(call) for call in stream.calls]
        parts = {"text": text, "thought": stream.thought, "tool_calls": calls}
        saved = {} if session is None else {"session": str(session)}
        room = {"tokens_left": stream.tokens_left, "dropped_messages": stream.dropped_messages}
        results.append({"tokens": stream.tokens, **parts, **stream.stats.as_dict(), **room, **saved})
    if as_json:
        print_json("generate", results[0] if len(results) == 1 else results)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the text to continue, from the command line, standard input or a file.

    Args:
        prompt: the text; `-` for standard input.
        file: a file with the text; None for none.

    Raises:
        InputError: the file cannot be read, or the text is not UTF-8, or empty.
    """
    origin = "--prompt"
    if file is not None or prompt == "-":
        origin = str(file) if file is not None else "standard input"
        if file is None and sys.stdin is None:
            raise InputError("standard input is closed; give the text with --prompt or --prompt-file")
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
        prompt = utf8_text(content, origin).removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise InputError(f"{origin}: the prompt is empty; give some text")
    return prompt


def open_bundle(bundle: Path, verify: bool = False) -> "Decoder":
    """Open a bundle for generation, with a progress bar while its files are checked.

    Args:
        bundle: bundle directory.
        verify: whether to read every file, not only those that may have changed since they were read.

    Raises:
        InputError: the directory is not a bundle, or the bundle cannot be loaded.
    """
    from runtime_ref.streaming import open_decoder

    with progress_bar(err, "checking files", sum(size for size, _ in read_manifest(bundle).files.values())) as progress:
        return open_decoder(bundle, progress=progress, verify=verify)
