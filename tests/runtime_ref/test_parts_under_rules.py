"""Rules about parts of a text: how long a thought may be, answers after thoughts, calls that fulfil tools' schemas."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from exporter.checkpoint.special_tokens import special_tokens
from runtime_ref.costs import Costs
from runtime_ref.decoder import Options
from runtime_ref.draft_length import DraftLength
from runtime_ref.drafts import GRAMMAR
from runtime_ref.errors import InputError
from runtime_ref.grammar import Vocabulary, regex_grammar
from runtime_ref.rules import Rules
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.text_parts import ANSWER, THOUGHT, TOOL_CALL, PartTracker
from runtime_ref.tool_calls import read_call
from runtime_ref.tool_grammar import call_grammar
from tests.chats import MARK, WEATHER, save_talking
from tests.runtime_ref import hashed
from tests.runtime_ref.hashed import HashedEngine

VOCAB = 2064
CHANNELS = {THOUGHT: (MARK["<|channel>"], MARK["<channel|>"]), TOOL_CALL: (MARK["<|tool_call>"], MARK["<tool_call|>"])}
ENDS = (1, MARK["<turn|>"], MARK["<|tool_response>"])
FORM = {"before": "call:", "after": "", "syntax": "pairs", "quote": '<|"|>'}
BOOK = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "Guests": {"type": "array", "items": {"$comment": "one", "enum": ["a", 3, None, True]}, "maxItems": 3},
                "night": {"type": ["integer", "null"], "minimum": 1, "maximum": 31},
                "rate": {"anyOf": [{"type": "number"}, {"const": "any"}]},
                "room": {
                    "type": "object",
                    "properties": {"code": {"type": "string", "pattern": "^[A-C]/[0-9]+$"}, "note": {"maxLength": 4}},
                    "required": ["code"],
                },
                "extra": {},
            },
            "required": ["night", "room"],
        },
    },
}
BOOK["function"]["parameters"]["properties"]["room"]["properties"]["note"]["type"] = "string"  # type: ignore[index]
PLAIN = {"type": "function", "function": {"name": "stop"}}
TOOLS = [WEATHER, BOOK, PLAIN]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("talking")
    save_talking(directory)
    return directory


@cache
def engine(seed: int = 0) -> HashedEngine:
    return HashedEngine(VOCAB, seed, ENDS, channels=CHANNELS)


@pytest.fixture(scope="module")
def vocabulary(talking: Path) -> Vocabulary:
    return Vocabulary(talking, engine().manifest)


def run(made: HashedEngine, options: Options, drafts: int | None = 0) -> tuple[list[int], Stats]:
    planner = DraftLength(8, Costs(8)) if drafts is None else None
    return hashed.run(made, replace(options, num_draft_tokens=drafts), planner)


def parts(tokens: list[int]) -> list[tuple[str, list[int]]]:
    """The parts of a text, marks left out."""
    tracker, of = PartTracker(CHANNELS, ENDS, hashed.PROMPT), []
    for token in tokens:
        part, is_mark = tracker.add(token)
        if not of or of[-1][0] != part or (is_mark and tracker.channel):
            of.append((part, []))
        of[-1][1].extend([] if is_mark else [token])
    return of


THINKS = {CHANNELS[THOUGHT][0]: 12.0, CHANNELS[THOUGHT][1]: -3.0, **dict.fromkeys(ENDS, -100.0)}


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_ends_after_its_budget(budget: int) -> None:
    """10,000 tokens, plain = speculative; thoughts together have no more tokens than they may."""
    made, rules = engine(), Rules(logit_bias=THINKS)
    options = Options(3334, sampling=Sampling(1.3, seed=budget), rules=rules, thinking_budget=budget)
    made.answer = ()
    plain, _ = run(made, options)
    made.answer = plain
    tokens, stats = run(made, options, 5)
    assert tokens == plain
    assert stats.accepted > 100
    assert run(made, replace(options, max_new_tokens=300), None)[0] == plain[:300]
    thoughts = [held for part, held in parts(plain) if part == THOUGHT]
    assert sum(map(len, thoughts)) == budget
    assert len(thoughts) > 100  # every later one is ended at once
    free, _ = run(made, Options(500, sampling=options.sampling, rules=rules))
    assert len([token for part, held in parts(free) if part == THOUGHT for token in held]) > 20


def test_the_end_of_a_thought_is_a_draft_that_is_accepted() -> None:
    options = Options(40, rules=Rules(logit_bias=THINKS), thinking_budget=0)
    _, stats = run(engine(), options, 3)
    forced = stats.sources[GRAMMAR]
    assert forced.drafted == forced.accepted > 3


def test_answers_match_after_thoughts(talking: Path, vocabulary: Vocabulary) -> None:
    tokenizer, made = Tokenizer.from_file(str(talking / "tokenizer.json")), engine()
    grammar, thought = regex_grammar(vocabulary, "[a-z]{3,9}\\."), 0
    for seed in range(40):
        options = Options(
            **{"max_new_tokens": 60, "sampling": Sampling(1.3, seed=seed)},
            **{"rules": Rules(logit_bias={CHANNELS[THOUGHT][0]: 30.0 * (seed % 2), CHANNELS[THOUGHT][1]: 5.0})},
            **{"grammars": {ANSWER: grammar}, "opens": frozenset({THOUGHT}), "thinking_budget": 10},
        )
        made.answer = ()
        plain, stats = run(made, options)
        made.answer = plain
        assert run(made, options, 4)[0] == run(made, options, None)[0] == plain
        of = parts(plain[:-1])
        assert {part for part, _ in of} <= {THOUGHT, ANSWER}
        thought += of[0][0] == THOUGHT
        if stats.finish_reason == "eos":
            (answer,) = (held for part, held in of if part == ANSWER)
            assert re.fullmatch(r"[a-z]{3,9}\.", tokenizer.decode(answer))
            assert of[-1][0] == ANSWER
    assert thought == 20


def test_calls_fulfil_the_schemas(talking: Path, vocabulary: Vocabulary) -> None:
    """Logits are noise, which wants to leave the syntax with every token; what is called differs from seed to seed."""
    tokenizer = Tokenizer.from_file(str(talking / "tokenizer.json"))
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}  # type: ignore
    grammar, called, tokens = call_grammar(vocabulary, TOOLS, FORM), [], 0
    bias = {CHANNELS[TOOL_CALL][0]: 30.0, **dict.fromkeys(ENDS, -100.0)}
    for seed in range(12):
        made = engine(seed)
        sampling = Sampling(1.3, seed=seed)
        options = Options(400, sampling=sampling, rules=Rules(logit_bias=bias), grammars={TOOL_CALL: grammar})
        made.answer = ()
        plain, _ = run(made, options)
        made.answer = plain
        assert run(made, options, None)[0] == plain
        speculative, stats = run(made, options, 4)
        assert speculative == plain
        assert stats.sources[GRAMMAR].accepted == stats.sources[GRAMMAR].drafted > 0
        of = parts(plain)
        whole = of[:-1] if of[-1][0] == TOOL_CALL else of  # the budget may end within a call
        for held in (held for part, held in whole if part == TOOL_CALL):
            call = read_call(tokenizer.decode(held, skip_special_tokens=False), FORM)
            assert not call.problem
            jsonschema.validate(dict(call.arguments), _without_nullable(schemas[call.name]))
            assert [*call.arguments] == sorted(call.arguments, key=str.lower)
            called.append(call.name)
        tokens += len(plain)
    assert {*called} == {*schemas} and len(called) > 30 and tokens > 4000


def test_a_call_ends_with_its_mark_alone(talking: Path, vocabulary: Vocabulary) -> None:
    tokenizer, (begin, end) = Tokenizer.from_file(str(talking / "tokenizer.json")), CHANNELS[TOOL_CALL]
    text = call_grammar(vocabulary, [PLAIN], FORM).begin(PartTracker(CHANNELS, ENDS, [begin]), TOOL_CALL, end)
    for token in tokenizer.encode("call:stop{}", add_special_tokens=False).ids:
        assert text.num_allowed([token, end]) >= 1 and text.num_allowed([end]) <= 1
        text.commit(token)
    mask = text.mask()
    assert mask is not None
    assert [token for token in range(VOCAB) if mask[token >> 3] >> (token & 7) & 1] == [end] == text.forced(3)
    text.commit(end)
    assert text.mask() is None  # between calls
    text.commit(begin)
    assert text.forced(1) == tokenizer.encode("call:stop{}", add_special_tokens=False).ids[:1]


def _without_nullable(schema: Any) -> Any:
    """The schema with OpenAPI's `nullable` spelled out, which JSON Schema does not know."""
    if not isinstance(schema, dict):
        return schema
    inner = {key: _without_nullable(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [inner, {"type": "null"}]} if schema.get("nullable") is True else inner


def test_calls_in_json_fulfil_them_too(vocabulary: Vocabulary, talking: Path) -> None:
    tokenizer = Tokenizer.from_file(str(talking / "tokenizer.json"))
    grammar = call_grammar(vocabulary, [WEATHER], {"before": "", "after": "", "syntax": "json"})
    text = grammar.begin(PartTracker(CHANNELS, ENDS, [CHANNELS[TOOL_CALL][0]]), TOOL_CALL, CHANNELS[TOOL_CALL][1])
    for call, valid in (({"place": "Bern"}, True), ({"place": 3}, False)):
        written = json.dumps({"name": "weather", "arguments": call})
        ids = [*tokenizer.encode(written, add_special_tokens=False).ids, CHANNELS[TOOL_CALL][1]]
        assert (text.num_allowed(ids) == len(ids)) == valid


@pytest.mark.parametrize(
    ("tools", "form", "message"),
    [
        ([{"type": "function"}], FORM, "a tool is .*, expected an object with type function and a function's name"),
        ([WEATHER], {}, "does not say how calls of tools are written"),
        ([{"format": "date"}], FORM, r"tool t: parameters.a.format: calls cannot be held to this keyword"),
        ([{"type": "text"}], FORM, r'tool t: parameters.a.type is "text", expected one of string, integer'),
        ([{"type": "array", "items": [1]}], FORM, r"tool t: parameters.a.items is \[1\], expected a JSON Schema"),
        ([{"enum": [[1]]}], FORM, r"tool t: parameters.a: a constant is \[1\]"),
        ([{"type": "object", "required": ["x"]}], FORM, "parameters.a.required names 'x'"),
        ([{"type": "string", "pattern": "("}], FORM, "the schema of the tools cannot be used"),
        ([{"type": "string", "pattern": "a", "maxLength": 3}], FORM, "has a pattern and a length"),
    ],
)
def test_schemas_that_calls_cannot_be_held_to(
    tools: list[Any], form: dict[str, str], message: str, vocabulary: Vocabulary
) -> None:
    whole = [
        tool
        if tool.get("type") == "function"
        else {"type": "function", "function": {"name": "t", "parameters": {"properties": {"a": tool}}}}
        for tool in tools
    ]
    with pytest.raises(InputError, match=message):
        call_grammar(vocabulary, whole, form)


def test_parts_that_a_bundle_does_not_have() -> None:
    bare = HashedEngine(300)
    for options, message in (
        (
            Options(4, thinking_budget=3),
            "a thinking budget is about thoughts, and the bundle's chat template marks none",
        ),
        (Options(4, thinking_budget=-1), "the thinking budget is -1 tokens, expected 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            hashed.run(bare, options)


def test_the_marks_are_those_of_the_checkpoint(talking: Path) -> None:
    tokens, _ = special_tokens(talking)
    assert (tokens.channels, tokens.eos, tokens.parts[TOOL_CALL]) == (CHANNELS, ENDS, FORM)
