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
from runtime_ref.json_file import read_json
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer

CHAT_TEMPLATE = "chat_template.jinja"
NO_TEMPLATE = (
    f"has no {CHAT_TEMPLATE} or no {TOKENIZER}, and a chat needs both; export a checkpoint that has them, or leave"
    " --chat out"
)

# Keys: `role` and `content`, a text or parts of `type` text; others as the template knows them, such as `tool_calls`.
Message = Mapping[str, Any]
Tool = Mapping[str, Any]


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

    def render(
        self,
        messages: Sequence[Message],
        ask: bool = True,
        tools: Sequence[Tool] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """Return the prompt that asks for an answer to the last message.

        It begins with the beginning-of-text token if the template writes one. Special tokens that are spelled out in a
        message count as special tokens, as in transformers.

        Args:
            messages: the conversation, oldest message first, each with a text `role` and with `content`, as the
                template knows them: `tool_calls`, and the role `tool` for what a tool answered.
            ask: whether to ask for an answer; otherwise the text ends with the last message.
            tools: what the model may call, each an object of type `function` with its name, description and a JSON
                Schema of its parameters; None for none.
            thinking: the template's `enable_thinking`; None leaves it to the template.

        Raises:
            InputError: messages or tools have another form, or the template refuses them.
        """
        copies = [dict(message) for message in _checked(messages)]
        more: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return self._template.render(
                messages=copies,
                tools=None if tools is None else _checked_tools(tools),
                documents=None,
                add_generation_prompt=ask,
                **self._special_tokens,
                **more,
            )
        except InputError:
            raise
        except Exception as error:  # a template is code: whatever it raises, these messages do not suit it
            raise InputError(f"the chat template refuses the messages: {_one_line(error)}; change them") from error

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool | None = None
    ) -> str:
        """Return the prompt of `render`, after checking that the template has a place for tools and thinking.

        Args:
            messages: as for `render`.
            tools: as for `render`.
            thinking: as for `render`.

        Raises:
            InputError: as `render`; or the template leaves tools out, or has no `enable_thinking`.
        """
        prompt = self.render(messages, tools=tools, thinking=thinking)
        if tools and prompt == self.render(messages, thinking=thinking):
            raise InputError("the chat template leaves out tools; pass none")
        if thinking is not None and prompt == self.render(messages, tools=tools, thinking=not thinking):
            raise InputError("the chat template has no enable_thinking; leave thinking to it")
        return prompt


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


def read_tools(path: Path) -> list[Tool]:
    """Read tools from a JSON file.

    Args:
        path: a file with a list of objects, each of type `function`.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    tools = read_json(path, "a list of tools")
    if not isinstance(tools, list):
        raise InputError(f"{path}: expected a JSON list of tools")
    try:
        json.dumps(tools, allow_nan=False)
        return _checked_tools(tools)
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    """Check the form of messages.

    Raises:
        InputError: it is not that of `ChatTemplate.render`.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages are {type(messages).__name__}, expected a list of objects with role and content")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"a message is {message!r:.60}, expected an object with the texts role and content")
        content = message.get("content")
        # A message that calls tools may have no content; what a tool answered may be any object.
        has_content = isinstance(content, str | list) or (content is None and message.keys() - {"role", "content"})
        if not has_content and message["role"] != "tool":
            raise InputError(f"a message is {message!r:.60}, expected an object with the texts role and content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping):
                raise InputError(f"a message has the content {part!r:.40}, expected an object with type and text")
            if part.get("type", "text") != "text":
                raise InputError(f"a message has content of type {part['type']!r:.40}; a bundle reads text alone")
    return messages


def _checked_tools(tools: Sequence[Tool]) -> list[Tool]:
    """Check the form of tools.

    Raises:
        InputError: it is not that of `ChatTemplate.render`.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InputError(f"tools are {type(tools).__name__}, expected a list of objects")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise InputError(f"a tool is {tool!r:.60}, expected an object with type function and a function")
        function = tool.get("function", {"name": ""})
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"a tool is {tool!r:.60}, expected a function with a name, which is a text")
        if not isinstance(function.get("parameters", {}), Mapping):
            raise InputError(f"the tool {function['name']} has parameters that are no object; give a JSON Schema")
    names = [tool["function"]["name"] for tool in tools if "function" in tool]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two tools are called {twice}, and a call could mean either; give each a name of its own")
    return [dict(tool) for tool in tools]


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
