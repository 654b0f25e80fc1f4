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
    """A chat_template.jinja, rendered as transformers 5.24.0 renders it."""

    def __init__(self, bundle: Path, tokenizer: TextTokenizer) -> None:
        """Read and compile the template.

        Args:
            bundle: directory that has a chat_template.jinja.
            tokenizer: the bundle's; it gives the texts of the special tokens that the template names.

        Raises:
            InputError: the template cannot be read or compiled.
        """
        path = bundle / CHAT_TEMPLATE
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); export the bundle again") from error
        self._template = parse_template(source, str(path), "export the bundle again")
        self._special_tokens = tokenizer.special_tokens

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that asks for an answer to the last message.

        It begins with the beginning-of-text token if the template writes one. Special tokens that are spelled out in a
        message count as special tokens, as in transformers.

        Args:
            messages: the conversation, oldest message first.

        Raises:
            InputError: the template refuses the messages.
        """
        copies = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=copies, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template is code: whatever it raises, these messages do not suit it
            raise InputError(f"the chat template refuses the messages: {_one_line(error)}; change them") from error


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
