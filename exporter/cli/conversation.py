"""A chat on a terminal."""

import contextlib
import importlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import click

from exporter.cli.printing import print_stream
from exporter.terminal import err
from runtime_ref.chat import Message
from runtime_ref.errors import InputError
from runtime_ref.streaming import Decoder
from runtime_ref.tokenizer import TOKENIZER

INPUT_SIGN = "> "
KEYS = "/quit or Ctrl-D ends, Ctrl-C stops an answer"
CHAT_GREETING = f"Chat: /new starts a new conversation, {KEYS}."
LINES_GREETING = f"The bundle has no chat template, so each line is continued as a text of its own: {KEYS}."
LEAVING_HINT = "Ctrl-D or /quit ends the chat."


def converse(decoder: Decoder, options: dict[str, Any]) -> None:
    """Answer lines from the terminal until the user leaves.

    With a chat template the lines are messages of a conversation. Without one, each line is continued as a text.

    Args:
        decoder: an open bundle.
        options: keyword arguments of `Decoder.stream`.

    Raises:
        InputError: the bundle has no tokenizer.
    """
    if decoder.tokenizer is None:
        raise InputError(f"{decoder.bundle}: has no {TOKENIZER}, which a chat needs; pass --prompt-ids")
    with contextlib.suppress(ImportError):  # it gives `input` line editing and a history
        importlib.import_module("readline")
    err.print(CHAT_GREETING if decoder.template else LINES_GREETING, style="dim")
    messages: list[Message] = []
    hint = LEAVING_HINT  # shown at the first Ctrl-C only
    while True:
        try:
            line = input(INPUT_SIGN)
            if line.strip() == "/quit":
                return
            if line.strip() == "/new":
                messages = []
            elif line.strip():
                messages = _turn(decoder, messages, line, options)
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            if hint:
                err.print(hint, style="dim")
            hint = ""
        except UnicodeDecodeError as error:
            err.print(f"error: the line is not valid {error.encoding}; type it again")


def _turn(decoder: Decoder, messages: list[Message], line: str, options: dict[str, Any]) -> list[Message]:
    """Answer a line, and return the conversation with line and answer; without them if it cannot be answered."""
    asked: list[Message] = [*messages, {"role": "user", "content": line}]
    try:
        stream = decoder.chat(asked, **options) if decoder.template else decoder.stream(line, **options)
    except InputError as error:
        err.print(f"error: {error}{', or start over with /new' if messages else ''}")
        return messages
    with _interrupts_to(stream.cancel):
        print_stream(stream)
    return [*asked, {"role": "assistant", "content": stream.text}] if decoder.template else []


@contextlib.contextmanager
def _interrupts_to(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` while the block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
