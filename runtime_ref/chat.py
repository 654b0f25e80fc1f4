"""Turn messages into one prompt with the bundle's chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime_ref.errors import InputError
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer

CHAT_TEMPLATE = "chat_template.jinja"
NO_TEMPLATE = (
    f"has no {CHAT_TEMPLATE} or no {TOKENIZER}, and a chat needs both; export a checkpoint that has them, or leave"
    " --chat out"
)

# Keys: `role` (system, user or assistant) and `content`.
Message = Mapping[str, str]


class ChatTemplate:
    """A chat template, rendered as transformers 5.24.0 renders it.

    Attributes:
        source: its text, in Jinja's language.
    """

    def __init__(self, source: str, origin: str, remedy: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: its text, in Jinja's language.
            origin: what an error names, a path for instance.
            remedy: what an error asks the user to do.
            special_tokens: texts of special tokens by the names under which templates know them.

        Raises:
            InputError: the text is not a template.
        """
        self.source = source
        self._template = parse_template(source, origin, remedy)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], ask: bool = True) -> str:
        """Return the prompt that asks for an answer to the last message.

        It begins with the beginning-of-text token if the template writes one. Special tokens that are spelled out in a
        message count as special tokens, as in transformers.

        Args:
            messages: the conversation, oldest message first, each with the keys `role` and `content`, both texts.
            ask: whether to ask for an answer; otherwise the text ends with the last message.

        Raises:
            InputError: the messages have another form, or the template refuses them.
        """
        copies = [dict(message) for message in _checked(messages)]
        try:
            return self._template.render(
                messages=copies, tools=None, documents=None, add_generation_prompt=ask, **self._special_tokens
            )
        except Exception as error:  # a template is code: whatever it raises, these messages do not suit it
            raise InputError(f"the chat template refuses the messages: {_one_line(error)}; change them") from error


def open_template(bundle: Path, tokenizer: TextTokenizer) -> ChatTemplate:
    """Read the chat template of a bundle.

    Args:
        bundle: directory that has a chat_template.jinja.
        tokenizer: the bundle's; it gives the texts of the special tokens that the template names.

    Raises:
        InputError: the template cannot be read or compiled.
    """
    path = bundle / CHAT_TEMPLATE
    try:
        source = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); export the bundle again") from error
    return ChatTemplate(source, str(path), "export the bundle again", tokenizer.special_tokens)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    """Check the form of messages.

    Raises:
        InputError: it is not that of `ChatTemplate.render`.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages are {type(messages).__name__}, expected a list of objects with role and content")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"a message is {message!r:.60}, expected an object with the texts role and content")
    return messages


def parse_template(source: str, origin: str, remedy: str) -> jinja2.Template:
    """Compile a chat template.

    Args:
        source: text of the template, in Jinja's language.
        origin: what the error names, a path for instance.
        remedy: what the error asks the user to do.

    Raises:
        InputError: the text is not a template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except Exception as error:  # besides its own errors, those of Python's compiler
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"{origin}: not a chat template ({line}{_one_line(error)}); {remedy}") from error


class _Generation(Extension):
    """`{% generation %}`: it marks the text that a model is trained on, and in a prompt it is only a scope."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's own filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
