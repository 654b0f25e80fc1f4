"""What a manifest says of prompts without Jinja: the format of chats, and the forms of conversations with tools."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.bundle.chat_format import ChatFormat, find_chat_format
from exporter.bundle.conversation_form import ConversationForm
from exporter.bundle.conversation_search import conversation_forms
from exporter.checkpoint.side_files import chat_template
from exporter.checkpoint.special_tokens import SpecialTokens
from exporter.checkpoint.template_marks import template_markers, template_words
from runtime_ref.chat import CHAT_TEMPLATE, ChatTemplate, Tool
from runtime_ref.errors import InputError
from runtime_ref.text_parts import TOOL_CALL
from runtime_ref.tokenizer import TOKENIZER, TextTokenizer


@dataclass(frozen=True)
class PlainChat:
    """Forms of a chat template's prompts.

    Attributes:
        chat: of messages alone; None if there is none.
        conversations: of conversations; none if the template knows neither thinking nor calls of tools.
        tools: what the conversations offer.
    """

    chat: ChatFormat | None = None
    conversations: tuple[ConversationForm, ...] = ()
    tools: tuple[Tool, ...] = ()

    @property
    def has_tools(self) -> bool:
        """Whether there is a form of prompts that offer the tools."""
        return any(form.tools for form in self.conversations)

    def metadata(self) -> dict[str, Any]:
        """Return the manifest's entries. FORMAT.md, "Chat" and "Conversations", specifies them."""
        return {
            **({"chat": asdict(self.chat)} if self.chat else {}),
            **({"conversations": [asdict(form) for form in self.conversations]} if self.conversations else {}),
            **({"tools": list(self.tools)} if self.has_tools else {}),
        }


def plain_chat(checkpoint: Path, tokens: SpecialTokens, tools: Sequence[Tool] = ()) -> PlainChat:
    """Return the forms of a checkpoint's chat template, as far as there are any.

    Args:
        checkpoint: the target's directory.
        tokens: its special tokens, which a template can spell out.
        tools: what the model may call.

    Raises:
        InputError: the template cannot be read; or there are tools and no template, no tokenizer that can be read, or
            the template leaves tools out.
    """
    source = chat_template(checkpoint)
    try:
        tokenizer = TextTokenizer(checkpoint, tokens)
    except InputError:  # the bundle runs on token ids alone
        if tools and (checkpoint / TOKENIZER).exists():
            raise
        source = None
    if source is None:
        if tools:
            raise InputError(
                f"{checkpoint}: has no {CHAT_TEMPLATE} or no {TOKENIZER}, and --tools needs both; leave it out"
            )
        return PlainChat()
    template = ChatTemplate(source, str(checkpoint / CHAT_TEMPLATE), "correct it", tokenizer.special_tokens)
    if tools:
        try:
            template.prompt([{"role": "user", "content": "Hi."}], tools)
        except InputError as error:
            raise InputError(f"{checkpoint}: --tools: {error}") from error
    if "strftime_now" in source:  # its prompts depend on the date
        return PlainChat(tools=tuple(tools))
    markers = tuple(dict.fromkeys([*template_markers(source), *tokenizer.special_tokens.values()]))
    ids = tokens.channels.get(TOOL_CALL)
    marks = (tokenizer.decode([ids[0]], special=True), tokenizer.decode([ids[1]], special=True)) if ids else None
    words = [word for word in template_words(source) if word not in markers]
    forms = conversation_forms(template, tools, marks, markers, words)
    return PlainChat(find_chat_format(template.render, markers, words), tuple(forms), tuple(tools))
