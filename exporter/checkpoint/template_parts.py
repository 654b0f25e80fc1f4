"""How a chat template writes thoughts and calls of tools: what stands around them, and in what syntax a call is."""

from collections.abc import Mapping
from typing import Any

from exporter.checkpoint.template_marks import rendered
from runtime_ref.chat import ChatTemplate
from runtime_ref.tool_calls import JSON, PAIRS, read_call

_NAME, _VALUE, _THOUGHT = "probe_name", "probe value", "Thought."
# Arguments that a syntax must give back as they were.
_PROBES: tuple[dict[str, Any], ...] = (
    {},
    {"text": "a text"},
    {"none": None, "true": True, "false": False, "count": 3, "less": -2.5, "small": 1e-07},
    {"texts": ["a", "", "é中👩‍💻"], "empty": [], "object": {"inner": {"deeper": "x", "list": [1, [2, {}]]}}},
    {"marks": "a{b}[c],d:e \"f\" 'g'\\n", "lines": " a\n\tb ", "number": "5", "word": "true"},
)


def call_marks(template: ChatTemplate, added_tokens: Mapping[str, int]) -> tuple[str, str] | None:
    """Return the tokens between which a template writes a call of a tool; None if there are none.

    Args:
        template: the chat template.
        added_tokens: ids of the tokenizer's added tokens, by text.
    """
    before, found, after = (_render(template, tool_calls=_calls({})) or "").partition(_NAME)
    # What stands between the name and the arguments is no end: that comes after a value as well.
    rest = (_render(template, tool_calls=_calls({"key": _VALUE})) or "").rpartition(_VALUE)[2]
    plain = _render(template) or ""
    starts = [(before.rfind(token), len(token), token) for token in added_tokens if token and token in before]
    ends = [
        (after.find(token), -len(token), token) for token in added_tokens if token and token in after and token in rest
    ]
    if not (found and starts and ends):
        return None
    begin, end = max(starts)[2], min(ends)[2]
    # A token that every turn has marks no calls.
    return None if begin == end or begin in plain or end in plain else (begin, end)


def after_call(template: ChatTemplate, added_tokens: Mapping[str, int], end: str) -> int | None:
    """Return the token that a template writes after a call that was not answered; None if it writes none.

    Args:
        template: the chat template.
        added_tokens: ids of the tokenizer's added tokens, by text.
        end: the token that ends a call.
    """
    text = (_render(template, tool_calls=_calls({})) or "").rpartition(end)[2].lstrip()
    matching = [token for token in added_tokens if token and text.startswith(token)]
    return added_tokens[max(matching, key=len)] if matching else None


def call_form(template: ChatTemplate, begin: str, end: str) -> dict[str, str] | None:
    """Return how a template writes calls, as `runtime_ref.tool_calls.read_call` reads them; None if no syntax fits.

    Args:
        template: the chat template.
        begin: the token that begins a call.
        end: the token that ends it.
    """

    def written(arguments: dict[str, Any]) -> str:
        return _between(_render(template, tool_calls=_calls(arguments)) or "", begin, end, _NAME)

    probe = written({"key": _VALUE})
    before, _, rest = probe.partition(_NAME)
    quote = rest.partition(_VALUE)[0].partition(":")[2].strip()
    after = rest.rpartition("}")[2]
    for form in (
        {"before": before, "after": after, "syntax": PAIRS, "quote": quote},
        {"before": probe.partition("{")[0], "after": after, "syntax": JSON},
    ):
        calls = [(arguments, read_call(written(arguments), form)) for arguments in _PROBES]
        if all((call.name, call.arguments, call.problem) == (_NAME, expected, "") for expected, call in calls):
            return form
    return None


def thought_form(template: ChatTemplate, begin: str, end: str) -> dict[str, str] | None:
    """Return what a template writes around a thought inside its marks; None if that is nothing.

    Args:
        template: the chat template.
        begin: the token that begins a thought.
        end: the token that ends it.
    """
    thought = {"reasoning": _THOUGHT, "reasoning_content": _THOUGHT}
    before, after = "", ""
    for more in ({}, {"tool_calls": _calls({})}):  # some repeat thoughts only beside calls
        region = _between(_render(template, **thought, **more) or "", begin, end, _THOUGHT)
        if region:
            before, _, after = region.partition(_THOUGHT)
            break
    else:
        # Others write an empty thought before an answer without thinking.
        asked = rendered(template, [{"role": "user", "content": "Hi."}], ask=True) or ""
        before = asked.partition(begin)[2].partition(end)[0] if end in asked.partition(begin)[2] else ""
    return {"before": before, "after": after} if before or after else None


def _calls(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": "000000001", "type": "function", "function": {"name": _NAME, "arguments": arguments}}]


def _between(text: str, begin: str, end: str, content: str) -> str:
    """The text between the marks around a content; empty if it is not between marks."""
    start = text.rfind(begin, 0, max(text.find(content), 0))
    inside, found, _ = text[start + len(begin) :].partition(end)
    return inside if start >= 0 and found and content in inside else ""


def _render(template: ChatTemplate, **more: Any) -> str | None:
    """The template's text of a question and an answer with more keys; None if it refuses them."""
    answer = {"role": "assistant", "content": "" if "tool_calls" in more else "Answer.", **more}
    return rendered(template, [{"role": "user", "content": "Hi."}, answer], ask=False)
