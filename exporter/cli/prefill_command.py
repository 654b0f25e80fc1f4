"""The command `prefill`, which runs a prompt once and saves it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.generate_command import open_bundle, read_prompt
from exporter.cli.options import PATH, bundle_argument, json_option, prompt_ids_option
from exporter.files import check_file, human_bytes
from exporter.terminal import out, print_json
from runtime_ref.errors import InputError
from runtime_ref.prompts import read_prompt_ids

if TYPE_CHECKING:
    from runtime_ref.chat import Message, Tool
    from runtime_ref.streaming import Decoder

FIRST_MESSAGES = ("0", "Hello.")  # of a user; whatever comes in their place, the prompt begins in the same way


@click.command()
@bundle_argument
@click.option("--prompt", help="Text to run; `-` reads it from standard input.")
@click.option("--prompt-file", type=PATH, help="File with the text; a line break at its end is left out.")
@prompt_ids_option()
@click.option(
    "--chat",
    is_flag=True,
    help="Take the prompt as the system prompt of a chat, and run what comes before the user's first message.",
)
@click.option("--tools", type=PATH, help="JSON file with the tools that the chat may call, as for `generate`.")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Whether the model thinks before it answers in the chat.",
    show_default="the chat template's",
)
@click.option("--output", type=PATH, required=True, help="Session file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
def prefill(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    prompt_ids: Path | None,
    chat: bool,
    tools: Path | None,
    thinking: bool | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Run a prompt once and save it as a session, which texts that begin with it go on from.

    `generate --session`, `Decoder.open_session` and the Kotlin runtime go on from the file without running the prompt.
    `generate` saves over it, so give it a copy, and the same --tools and --thinking: they are part of the prompt.
    """
    from exporter.cli.printing import prompt_bar
    from exporter.cli.terminal_chat import system_messages
    from runtime_ref.chat import NO_TEMPLATE, read_tools

    if sum(source is not None for source in (prompt, prompt_file, prompt_ids)) != 1:
        raise click.UsageError("give one of --prompt, --prompt-file and --prompt-ids")
    if chat and prompt_ids is not None:
        raise click.UsageError("--chat cannot be used with --prompt-ids; give --prompt instead")
    if (tools is not None or thinking is not None) and not chat:
        raise click.UsageError(f"{'--tools' if tools is not None else '--thinking or --no-thinking'} goes with --chat")
    check_file(output, force)
    text = "" if prompt_ids is not None else read_prompt(prompt, prompt_file)
    prompts = [] if prompt_ids is None else read_prompt_ids(prompt_ids)
    if len(prompts) > 1:
        raise InputError(f"{prompt_ids}: has {len(prompts)} prompts, expected one; a session is that of one prompt")
    with open_bundle(bundle) as decoder:
        conversation = decoder.conversation()
        run: str | list[int] = prompts[0] if prompts else text
        if chat:
            if decoder.template is None:
                raise InputError(f"{bundle}: {NO_TEMPLATE}")
            messages = system_messages(decoder, text)
            conversation.messages = messages
            run = chat_beginning(decoder, messages, read_tools(tools) if tools else None, thinking)
        stream = conversation.stream(run, max_new_tokens=1, num_draft_tokens=0)
        with prompt_bar() as stream.progress:
            for _ in stream:
                pass
        conversation.save(output)
    tokens, seconds, size = conversation.position, stream.stats.prefill_seconds, output.stat().st_size
    if as_json:
        print_json("prefill", {"session": str(output), "tokens": tokens, "seconds": seconds, "bytes": size})
    else:
        out.print(f"{output}: {tokens} tokens, run in {seconds:.1f} s, {human_bytes(size)}", soft_wrap=True)


def chat_beginning(
    decoder: "Decoder", messages: "list[Message]", tools: "list[Tool] | None", thinking: bool | None
) -> list[int]:
    """Return the token ids that all prompts of a chat begin with, whatever the user's first message is.

    Args:
        decoder: an open bundle with a chat template.
        messages: what comes before that message: the system prompt.
        tools: what the model may call.
        thinking: whether the model thinks; None leaves it to the template.

    Raises:
        InputError: the template refuses messages, tools or thinking, or its prompts have no beginning in common.
    """
    from runtime_ref.acceptance import common_prefix

    assert decoder.template is not None and decoder.tokenizer is not None
    one, other = (
        decoder.tokenizer.encode(
            decoder.template.prompt([*messages, {"role": "user", "content": content}], tools, thinking)
        )
        for content in FIRST_MESSAGES
    )
    if not (shared := common_prefix(one, other)):
        raise InputError(
            f"{decoder.bundle}: prompts of its chat template have no beginning in common; leave out --chat"
        )
    return one[:shared]
