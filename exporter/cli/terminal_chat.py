"""A chat on a terminal."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from exporter.cli.printing import print_stream
from exporter.terminal import err
from runtime_ref.chat import Message
from runtime_ref.conversation import Conversation
from runtime_ref.errors import InputError
from runtime_ref.streaming import Decoder
from runtime_ref.tokenizer import TOKENIZER
from runtime_ref.tool_calls import ToolCall

INPUT_SIGN = "> "
NEXT_LINE_SIGN = ". "
KEYS = "/quit or Ctrl-D ends, Ctrl-C stops an answer, Alt-Enter or a \\ at the end goes on in another line"
CHAT_GREETING = f"Chat: /new starts a new conversation, /system TEXT one with a system prompt, {KEYS}."
LINES_GREETING = f"The bundle has no chat template, so each line is continued as a text of its own: {KEYS}."
NOT_ANSWERED = "Stopped before an answer began: the conversation goes on without your message and all after it."
LEAVING_HINT = "Ctrl-D or /quit ends the chat."


def system_messages(decoder: Decoder, system: str | None) -> list[Message]:
    """Return what a conversation begins with: the system prompt, if there is one.

    Args:
        decoder: an open bundle.
        system: the system prompt; None for none.

    Raises:
        InputError: the bundle's chat template leaves system prompts out.
    """
    if system is None or decoder.template is None:
        return []
    start: list[Message] = [{"role": "system", "content": system}]
    if system.strip() not in decoder.template.render([*start, {"role": "user", "content": "Hello."}]):
        raise InputError(f"{decoder.bundle}: its chat template leaves out system prompts; leave out --system")
    return start


def open_conversation(decoder: Decoder, session: Path, system: str | None) -> Conversation:
    """Return the conversation of a session file, or an empty one if there is no such file.

    Args:
        decoder: an open bundle.
        session: the file.
        system: the system prompt that was asked for; None for none.

    Raises:
        InputError: as `Decoder.open_session`, or there is a system prompt and the session has messages.
    """
    if not session.exists():
        return decoder.conversation()
    conversation = decoder.open_session(session)
    if system is not None and conversation.messages:
        raise InputError(f"{session}: has a chat already; leave out --system, or choose another file")
    return conversation


def converse(
    decoder: Decoder,
    options: dict[str, Any],
    system: str | None = None,
    chat_options: Mapping[str, Any] = MappingProxyType({}),
    conversation: Conversation | None = None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Answer messages from the terminal until the user leaves.

    With a chat template they are a conversation. Without one, each is continued as a text. A message is a line, or
    several that were pasted at once or joined, see `KEYS`.

    Args:
        decoder: an open bundle.
        options: keyword arguments of `Decoder.stream`.
        system: the conversation's system prompt, which needs a chat template; None for none.
        chat_options: those of `Decoder.chat`: tools, whose answers the user types, and thinking.
        conversation: goes on from its messages and gets those that follow; None for the decoder's own, from the start.
        save: called after each answer: a terminal may close at any time.

    Raises:
        InputError: the bundle has no tokenizer.
    """
    if decoder.tokenizer is None:
        raise InputError(f"{decoder.bundle}: has no {TOKENIZER}, which a chat needs; pass --prompt-ids")
    _edit_lines()
    err.print(CHAT_GREETING if decoder.template else LINES_GREETING, style="dim")
    start = system_messages(decoder, system)
    texts = conversation or decoder
    messages = start
    if conversation is not None and conversation.messages:
        messages = [*conversation.messages]
        start = messages[: messages[0]["role"] == "system"]  # for the conversations after it as well
    if decoder.template and len(messages) > len(start):
        err.print(f"The conversation goes on after {len(messages)} messages.", style="dim")
    all_options = {**options, **(chat_options if decoder.template else {})}
    hint = LEAVING_HINT  # shown at the first Ctrl-C only
    while True:
        try:
            line = _read_message()
            if line.strip() == "/quit":
                return
            command, _, argument = line.strip().partition(" ")
            if command in ("/new", "/system") and not decoder.template:
                err.print(LINES_GREETING, style="dim")
            elif command == "/new":
                messages = start
            elif command == "/system":
                messages = start = system_messages(decoder, argument or None)
            elif line.strip():
                answered = _answered(
                    texts, decoder.template is not None, [*messages, {"role": "user", "content": line}], all_options
                )
                if decoder.template and answered is None:
                    err.print(NOT_ANSWERED, style="dim")
                elif decoder.template and answered:
                    messages = answered
            if conversation is not None and decoder.template:
                conversation.messages = messages
            save()
        except InputError as error:
            err.print(f"error: {error}{', or start over with /new' if messages else ''}")
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


def _answered(
    texts: Decoder | Conversation, chat: bool, asked: list[Message], options: dict[str, Any]
) -> list[Message] | None:
    """Return the conversation up to the answer to its last message; None if it was stopped before the answer began.

    Between the two are calls of tools, and what these answer.

    Raises:
        InputError: it cannot be answered.
    """
    while asked[-1]["role"] != "assistant":
        stream = texts.chat(asked, **options) if chat else texts.stream(asked[-1]["content"], **options)
        with _interrupts_to(stream.cancel):
            print_stream(stream)
        if not stream.tokens:
            return None
        calls = [call for call in stream.calls if not call.problem] if chat else []
        asked = [*asked, stream.message, *map(_ask_tool, calls)]
    return asked


def _ask_tool(call: ToolCall) -> Message:
    """Let the user answer for a tool."""
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": input(f"{call.name}{INPUT_SIGN}")}


@contextlib.contextmanager
def _interrupts_to(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` while the block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
