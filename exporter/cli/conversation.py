"""A chat on a terminal."""

import contextlib
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
NEXT_LINE_SIGN = ". "
KEYS = "/quit or Ctrl-D ends, Ctrl-C stops an answer, Alt-Enter or a \\ at the end goes on in another line"
CHAT_GREETING = f"Chat: /new starts a new conversation, {KEYS}."
LINES_GREETING = f"The bundle has no chat template, so each line is continued as a text of its own: {KEYS}."
LEAVING_HINT = "Ctrl-D or /quit ends the chat."


def converse(decoder: Decoder, options: dict[str, Any], system: str | None = None) -> None:
    """Answer messages from the terminal until the user leaves.

    With a chat template they are a conversation. Without one, each is continued as a text. A message is a line, or
    several that were pasted at once or joined, see `KEYS`.

    Args:
        decoder: an open bundle.
        options: keyword arguments of `Decoder.stream`.
        system: the conversation's system prompt, which needs a chat template; None for none.

    Raises:
        InputError: the bundle has no tokenizer.
    """
    if decoder.tokenizer is None:
        raise InputError(f"{decoder.bundle}: has no {TOKENIZER}, which a chat needs; pass --prompt-ids")
    _edit_lines()
    err.print(CHAT_GREETING if decoder.template else LINES_GREETING, style="dim")
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = start
    hint = LEAVING_HINT  # shown at the first Ctrl-C only
    while True:
        try:
            line = _read_message()
            if line.strip() == "/quit":
                return
            if line.strip() == "/new":
                messages = start
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


def _edit_lines() -> None:
    """Give `input` line editing and a history, and let it take pasted lines as one message, where the system can."""
    try:
        import readline
    except ImportError:
        return
    if "libedit" not in (readline.__doc__ or ""):  # it has neither, and another language of settings
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter


def _read_message() -> str:
    """Read a message from the terminal; a backslash at the end of a line joins the next one to it."""
    message = input(INPUT_SIGN)
    while message.endswith("\\"):
        message = f"{message[:-1]}\n{input(NEXT_LINE_SIGN)}"
    return message


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
