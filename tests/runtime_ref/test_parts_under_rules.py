"""Rules about parts of a text: how long a thought may be, answers after thoughts, calls that fulfil tools' schemas."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from exporter.checkpoint.special_tokens import special_tokens
from exporter.demo import PAIR
from runtime_ref.chat import ChatTemplate
from runtime_ref.costs import Costs
from runtime_ref.decoder import Options, generate
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
from tests.chats import MARK, TALKING, WEATHER, save_talking
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


@pytest.mark.parametrize("tokens", [800, pytest.param(3334, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_ends_after_its_budget(budget: int, tokens: int) -> None:
    """Plain = speculative, also for 10,000 tokens in all; thoughts together have no more tokens than they may."""
    made, rules = engine(), Rules(logit_bias=THINKS)
    options = Options(tokens, sampling=Sampling(1.3, seed=budget), rules=rules, thinking_budget=budget)
    made.answer = ()
    plain, _ = run(made, options)
    made.answer = plain
    speculative, stats = run(made, options, 5)
    assert speculative == plain
    assert stats.accepted > 100
    assert run(made, replace(options, max_new_tokens=300), None)[0] == plain[:300]
    thoughts = [held for part, held in parts(plain) if part == THOUGHT]
    assert sum(map(len, thoughts)) == budget
    assert (len(thoughts) > 0) == (budget > 0)  # no thought begins that may have no token
    free, _ = run(made, Options(500, sampling=options.sampling, rules=rules))
    assert len([token for part, held in parts(free) if part == THOUGHT for token in held]) > 20


def test_the_end_of_a_thought_is_a_draft_that_is_accepted() -> None:
    options = Options(40, rules=Rules(logit_bias={**THINKS, CHANNELS[THOUGHT][1]: -60.0}), thinking_budget=2)
    _, stats = run(engine(), options, 3)
    forced = stats.sources[GRAMMAR]
    assert forced.drafted == forced.accepted == 1


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


@pytest.mark.parametrize("seeds", [(5, 11), pytest.param(range(12), marks=pytest.mark.slow)], ids=str)
def test_calls_fulfil_the_schemas(seeds: Sequence[int], talking: Path, vocabulary: Vocabulary) -> None:
    """Logits are noise, which wants to leave the syntax with every token; what is called differs from seed to seed."""
    tokenizer = Tokenizer.from_file(str(talking / "tokenizer.json"))
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}  # type: ignore
    grammar, called, tokens = call_grammar(vocabulary, TOOLS, FORM), [], 0
    bias = {CHANNELS[TOOL_CALL][0]: 30.0, **dict.fromkeys(ENDS, -100.0)}
    for seed in seeds:
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
    assert {*called} == {*schemas} and len(called) > 2.5 * len(seeds) and 12 * tokens > 4000 * len(seeds)


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


# As Pydantic writes them: definitions, of which one refers to itself, alternatives with null, titles, formats.
PYDANTIC: dict[str, Any] = {
    "$defs": {
        "Address": {"properties": {"city": {"title": "C", "type": "string"}}, "required": ["city"], "type": "object"},
        "Node": {
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None}},
            "type": "object",
        },
    },
    "properties": {
        "home": {"allOf": [{"$ref": "#/$defs/Address"}]},
        "day": {"format": "date", "type": "string"},
        "link": {"pattern": "^https?:\\/\\/[a-z]+/x$", "type": "string"},
        "list": {"$ref": "#/$defs/Node"},
    },
    "required": ["home"],
}
VALID = {"day": "2026-11-27", "home": {"city": "Bern"}, "link": "https://a/x", "list": {"next": {"next": None}}}


@pytest.mark.parametrize("form", [FORM, {"before": "\n", "after": "\n", "syntax": "json"}], ids=["pairs", "json"])
def test_schemas_as_pydantic_writes_them(form: dict[str, str], vocabulary: Vocabulary, talking: Path) -> None:
    tools = [PLAIN, {"type": "function", "function": {"name": "visit", "parameters": PYDANTIC}}]
    tokenizer, (begin, end) = Tokenizer.from_file(str(talking / "tokenizer.json")), CHANNELS[TOOL_CALL]
    text = call_grammar(vocabulary, tools, form).begin(PartTracker(CHANNELS, ENDS, [begin]), TOOL_CALL, end)
    arguments = (VALID, {**VALID, "home": {}}, {**VALID, "link": "ftp://a/x"}, {**VALID, "list": {"next": 3}})
    for item in arguments:
        written = ChatTemplate(TALKING, "t", "", {}).render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [_call("visit", item)]}], ask=False
        )
        written = written.partition("<|tool_call>")[2].partition("<tool_call|>")[0]
        if form is not FORM:
            ordered = {key: item[key] for key in PYDANTIC["properties"]}
            written = "\n" + json.dumps({"name": "visit", "arguments": ordered}) + "\n"
        ids = [*tokenizer.encode(written, add_special_tokens=False).ids, end]
        assert (text.num_allowed(ids) == len(ids)) == (item is VALID), written


@pytest.mark.parametrize("form", [FORM, {"before": "", "after": "", "syntax": "json"}], ids=["pairs", "json"])
def test_a_tool_without_parameters_has_no_arguments(
    form: dict[str, str], vocabulary: Vocabulary, talking: Path
) -> None:
    tokenizer, (begin, end) = Tokenizer.from_file(str(talking / "tokenizer.json")), CHANNELS[TOOL_CALL]
    text = call_grammar(vocabulary, [PLAIN], form).begin(PartTracker(CHANNELS, ENDS, [begin]), TOOL_CALL, end)
    for inner, valid in (("{}", True), ("[1]", False), ("5", False)):
        written = f"call:stop{inner}" if form is FORM else f'{{"name": "stop", "arguments": {inner}}}'
        ids = [*tokenizer.encode(written, add_special_tokens=False).ids, end]
        assert (text.num_allowed(ids) == len(ids)) == valid


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_an_answer_may_end_after_a_call(vocabulary: Vocabulary) -> None:
    """The tool's answer comes first then; without a call, an empty answer is none."""
    grammar, (begin, end) = regex_grammar(vocabulary, "[a-z]+"), CHANNELS[TOOL_CALL]
    text = grammar.begin(PartTracker(CHANNELS, ENDS, []), ANSWER, None, [begin])

    def allowed(token: int) -> bool:
        mask = text.mask()
        assert mask is not None
        return bool(mask[token >> 3] >> (token & 7) & 1)

    assert allowed(begin) and not allowed(ENDS[2])
    for token in (begin, 500, end):
        text.commit(token)
    assert allowed(begin) and allowed(ENDS[2]) and text.num_allowed([ENDS[2]]) == 1


def test_marks_that_are_plain_text_stay_marks(tmp_path: Path) -> None:
    """Tokens that are added and not special: a text may have them, but not where they would open or close a channel."""
    document = json.loads((PAIR / "target" / "tokenizer.json").read_text())
    for token, content in ((2048, "[CALL]"), (2049, "[/CALL]"), (2050, "<td>")):
        document["added_tokens"].append(
            {**document["added_tokens"][-1], "id": token, "content": content, "special": False}
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    marks = {TOOL_CALL: (2048, 2049)}
    made = HashedEngine(2051, 0, [1], channels=marks)
    vocabulary, tokenizer = Vocabulary(tmp_path, made.manifest), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    short = {"properties": {"k": {"type": "string", "maxLength": 6}}, "required": ["k"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "t", "parameters": short}}]
    grammar = call_grammar(vocabulary, tools, {"before": "", "after": "", "syntax": "json"})
    for seed in range(4):
        options = Options(
            **{"max_new_tokens": 200, "sampling": Sampling(1.3, seed=seed), "grammars": {TOOL_CALL: grammar}},
            rules=Rules(logit_bias={2048: 60.0, 2049: 20.0, 1: -100.0}),
        )
        tokens, _ = run(made, options)
        text = tokenizer.decode(tokens)
        calls = [read_call(part.partition("[/CALL]")[0], {"syntax": "json"}) for part in text.split("[CALL]")[1:-1]]
        assert calls and not [call.problem for call in calls if call.problem]
    free = regex_grammar(vocabulary, "a b<td>(c|d)").begin(PartTracker(marks, [1]))
    while (mask := free.mask()) is not None:
        free.commit(next(token for token in range(2051) if mask[token >> 3] >> (token & 7) & 1))


def test_what_was_chosen_before_the_rules_leave_nothing_is_given_out(vocabulary: Vocabulary, talking: Path) -> None:
    """As without drafts: the error comes in the same place."""
    tokenizer = Tokenizer.from_file(str(talking / "tokenizer.json"))
    digits = [token for token in range(VOCAB) if any(c.isdigit() for c in tokenizer.decode([token]))]
    digits += [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(0x30, 0x3A)]
    grammar = regex_grammar(vocabulary, "alpha beta gamma delta[0-9]{3}")
    given = []
    for drafts in (0, 4, 8, None):
        made, tokens = engine(), list[int]()
        options = Options(60, drafts, rules=Rules(frozenset(digits)), grammars={ANSWER: grammar})
        planner = DraftLength(8, Costs(8)) if drafts is None else None
        with pytest.raises(InputError, match="the rules allow no token"):
            tokens.extend(iter(generate(made, hashed.PROMPT, options, Stats(), planner)))
        given.append(tokens)
    assert tokenizer.decode(given[0]) == "alpha beta gamma delta"
    assert given == [given[0]] * 4


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
        ([{"uniqueItems": True}], FORM, r"tool t: parameters.a.uniqueItems: calls cannot be held to this keyword"),
        ([{"enum": None}], FORM, r"tool t: parameters.a.enum is None, expected a list that is not empty"),
        ([{"type": "array", "minItems": "x"}], FORM, r"parameters.a.minItems is 'x', expected a whole number"),
        ([{"type": "string", "minLength": None}], FORM, r"parameters.a.minLength is None, expected a whole number"),
        ([{"anyOf": []}], FORM, r"parameters.a.anyOf is \[\], expected a list that is not empty"),
        ([{"type": "number", "minimum": "x"}], FORM, r"parameters.a.minimum is 'x', expected a number"),
        ([{"properties": []}], FORM, r"parameters.a.properties is \[\], expected an object"),
        ([{"$ref": "#/$defs/none"}], FORM, r"parameters.a.\$ref is '#/\$defs/none', which is nothing in the tool's"),
        ([{"properties": {"c:d": {}}}], FORM, "parameters.a has the property 'c:d', which calls cannot write"),
        ([{"type": "function", "function": {"name": "t", "parameters": "x"}}], FORM, "tool t: parameters are 'x', exp"),
        ([{"type": "text"}], FORM, "tool t: parameters.a.type is 'text', expected one of string, integer"),
        ([{"type": "array", "items": [1]}], FORM, r"tool t: parameters.a.items is \[1\], expected a JSON Schema"),
        ([{"enum": [[1]]}], FORM, r"tool t: parameters.a: a constant is \[1\]"),
        ([{"type": "object", "required": ["x"]}], FORM, "parameters.a.required names 'x'"),
        ([{"type": "string", "pattern": "("}], FORM, r"tool t: parameters.a.pattern cannot be used"),
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
