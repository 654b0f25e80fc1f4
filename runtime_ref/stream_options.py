"""How a text is generated, from the arguments that applications pass to `Decoder.stream` and `Decoder.chat`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime_ref.arguments import biases, flag, integer, number, suppressed_ids, text
from runtime_ref.chat import Tool
from runtime_ref.decoder import Options, check_options
from runtime_ref.errors import InputError
from runtime_ref.grammar import Grammar, Vocabulary, json_grammar, regex_grammar
from runtime_ref.manifest import Manifest
from runtime_ref.rules import Rules, check_parts
from runtime_ref.sampling import Sampling
from runtime_ref.text_parts import ANSWER, THOUGHT, TOOL_CALL
from runtime_ref.tool_grammar import call_grammar


def read_sampling(
    manifest: Manifest, temperature: float | None, top_p: float | None, top_k: int | None, seed: int
) -> Sampling:
    """Return how tokens are chosen; the arguments are those of `Decoder.stream`.

    Raises:
        InputError: one is of another kind or out of its range.
    """
    defaults = manifest.sampling
    return Sampling(
        number("temperature", defaults.temperature if temperature is None else temperature),
        number("top_p", defaults.top_p if top_p is None else top_p),
        integer("seed", seed),
        integer("top_k", defaults.top_k if top_k is None else top_k),
    )


def read_rules(
    manifest: Manifest,
    suppress: Sequence[int],
    logit_bias: Mapping[int, float] | None,
    repetition_penalty: float | None,
    presence_penalty: float,
    frequency_penalty: float,
) -> Rules:
    """Return what changes logits; the arguments are those of `Decoder.stream`.

    Raises:
        InputError: one is of another kind or out of its range.
    """
    usual = manifest.repetition_penalty
    return Rules(
        suppressed_ids(suppress),
        biases(logit_bias),
        number("repetition_penalty", usual if repetition_penalty is None else repetition_penalty),
        number("presence_penalty", presence_penalty),
        number("frequency_penalty", frequency_penalty),
    )


def read_grammars(vocabulary: Callable[[], Vocabulary], json_schema: Any, regex: Any) -> dict[str, Grammar]:
    """Compile what the answer must match, if anything; `json_schema` and `regex` are those of `Decoder.stream`.

    Args:
        vocabulary: returns the bundle's tokens as grammars see them, which takes seconds at full size.
        json_schema: JSON Schema as a text or parsed, or None.
        regex: regular expression, or None.

    Raises:
        InputError: both are given, or one cannot be used.
    """
    if json_schema is None and regex is None:
        return {}
    if json_schema is not None and regex is not None:
        raise InputError("both json_schema and regex are given, expected one of them")
    if regex is not None:
        return {ANSWER: regex_grammar(vocabulary(), text("regex", regex))}
    return {ANSWER: json_grammar(vocabulary(), json_schema)}


def read_options(
    manifest: Manifest,
    max_new_tokens: int,
    num_draft_tokens: int | None,
    thinking_budget: int | None,
    sampling: Sampling,
    rules: Rules,
    grammars: Mapping[str, Grammar],
) -> Options:
    """Put options together and check them; the numbers are those of `Decoder.stream`.

    Raises:
        InputError: a number is of another kind, or as `check_options`.
    """
    options = Options(
        integer("max_new_tokens", max_new_tokens),
        None if num_draft_tokens is None else integer("num_draft_tokens", num_draft_tokens),
        sampling,
        rules,
        grammars,
        thinking_budget=None if thinking_budget is None else integer("thinking_budget", thinking_budget),
    )
    check_options(manifest, options)
    return options


def read_parts(
    manifest: Manifest,
    vocabulary: Callable[[], Vocabulary],
    tools: Sequence[Tool] | None,
    thinking: bool | None,
    strict_tools: bool,
) -> tuple[dict[str, Grammar], frozenset[str]]:
    """Return what an answer's other parts must match, and which may come before it, as `Options.opens`.

    Args:
        manifest: the bundle's.
        vocabulary: returns the bundle's tokens as grammars see them.
        tools: those of `Decoder.chat`, which its template took.
        thinking: that of `Decoder.chat`, checked already.
        strict_tools: that of `Decoder.chat`.

    Raises:
        InputError: `strict_tools` is of another kind, or cannot be kept.
    """
    calls = {}
    if flag("strict_tools", strict_tools):
        if not tools:
            raise InputError("strict_tools holds calls to tools, and there are none; pass tools, or leave it out")
        check_parts(manifest, [TOOL_CALL], (), None)
        calls = {TOOL_CALL: call_grammar(vocabulary(), tools, manifest.parts.get(TOOL_CALL, {}))}
    opens = {*([THOUGHT] if thinking else []), *([TOOL_CALL] if tools else [])} & manifest.channels.keys()
    return calls, frozenset(opens)
