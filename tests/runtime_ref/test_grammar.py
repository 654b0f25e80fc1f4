"""Structured output: valid by jsonschema and Python's re on logits that want to leave it; drafts that are forced."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from exporter.demo import PAIR
from runtime_ref.acceptance import Round
from runtime_ref.costs import DRAFTER, Costs
from runtime_ref.decoder import Options
from runtime_ref.draft_length import DraftLength
from runtime_ref.drafts import GRAMMAR, FixedDrafts, PlannedDrafts
from runtime_ref.errors import InputError
from runtime_ref.grammar import Grammar, Vocabulary, json_grammar, regex_grammar
from runtime_ref.rules import Rules, text_chooser
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import open_decoder
from runtime_ref.text_parts import ANSWER, PartTracker
from tests.conftest import Run
from tests.runtime_ref.hashed import PROMPT, HashedEngine, run

TOKENIZER = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
VOCAB, EOS = 2048, 1
BEYOND = 45  # ids that the tokenizer does not have, more than llguidance's masks are filled up by
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["function", "class", "module"]},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "nested": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
PERSON["properties"]["nested"]["additionalProperties"] = False  # type: ignore[index]
SCHEMAS = {
    "object": PERSON,
    "choice": {"enum": ["yes", "no", 3, None]},
    "one of": {"oneOf": [{"type": "integer", "maximum": 9999, "minimum": 0}, {"const": {"a": []}}]},
    "pattern": {"type": "string", "pattern": "^[A-F]{2}-\\d{4}$"},
}
REGEXES = ["(yes|no|perhaps)", "[A-Z][a-z]{2,8}( [a-z]{1,6}){0,5}\\.", "(\\d{1,3}, ){2,6}\\d{1,3}", "é(中|😀){3,5}\\n?"]
ADVERSE = Sampling(1.5, seed=2)


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(PAIR / "target", engine().manifest)


def engine(seed: int = 0) -> HashedEngine:
    """Logits are noise over all tokens, so the largest 64 of 2048 are seldom what a grammar allows."""
    return HashedEngine(VOCAB + BEYOND, seed, [EOS])


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def decode(
    made: HashedEngine, grammar: Grammar, budget: int, drafts: int | None = 0, **options: Any
) -> tuple[Any, Any]:
    planner = DraftLength(8, Costs(8)) if drafts is None else None
    return run(made, Options(budget, drafts, options.pop("sampling", ADVERSE), grammars={ANSWER: grammar}), planner)


GRAMMARS: dict[str, tuple[Callable[[], Grammar], Callable[[str], object]]] = {
    name: (
        lambda schema=schema: json_grammar(vocabulary(), schema),
        lambda text, schema=schema: jsonschema.validate(json.loads(text), schema),
    )
    for name, schema in SCHEMAS.items()
} | {
    regex: (lambda regex=regex: regex_grammar(vocabulary(), regex), lambda text, regex=regex: _full(regex, text))
    for regex in REGEXES
}


def _full(regex: str, text: str) -> None:
    assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 6), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_are_valid_up_to_the_budget(name: str, seeds: range) -> None:
    """A text that ends is valid; one that the budget cuts off is the beginning of one that ends."""
    grammar, check = GRAMMARS[name][0](), GRAMMARS[name][1]
    for seed in seeds:
        made = engine(seed)
        for sampling in (Sampling(), ADVERSE):
            tokens, stats = decode(made, grammar, 400, sampling=sampling)
            assert (tokens[-1], stats.finish_reason) == (EOS, "eos")
            check(text_of(tokens[:-1]))
            for budget in range(1, len(tokens), max(1, len(tokens) // 5)):
                cut, stats = decode(made, grammar, budget, drafts=seed % 4, sampling=sampling)
                assert (cut, stats.finish_reason) == (tokens[:budget], "length")


@pytest.mark.parametrize("total", [1600, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GRAMMARS)
def test_sampled_tokens_are_those_of_plain_decoding(name: str, total: int) -> None:
    """Texts end soon, so there are many of them, `total` tokens in all with those of the other grammars."""
    grammar, made = GRAMMARS[name][0](), engine()
    tokens, accepted = 0, 0
    for seed in range(450):
        sampling = Sampling(1.3, 0.99, seed)
        made.answer = ()
        plain, _ = decode(made, grammar, 60, sampling=sampling)
        made.answer = plain
        for drafts in (1 + seed % 7, None):
            speculative, stats = decode(made, grammar, 60, drafts, sampling=sampling)
            assert speculative == plain
            accepted += stats.accepted
        tokens += len(plain)
        if tokens >= total / len(GRAMMARS):
            break
    else:
        pytest.fail(f"only {tokens} tokens")
    assert accepted > total / 50


def test_forced_tokens_are_drafts_that_are_accepted() -> None:
    made, grammar = engine(), json_grammar(vocabulary(), PERSON)
    plain, _ = decode(made, grammar, 100)
    tokens, stats = decode(made, grammar, 100, 4)
    assert tokens == plain
    forced = stats.sources[GRAMMAR]
    assert forced.accepted == forced.drafted > 15
    planner = DraftLength(8, Costs(8))
    for count in range(9):  # a long pass costs nothing
        planner.costs.record(count, 1.0, 0.01)
        planner.costs.record(count, 1.0, 0.01)
    planner.costs.record = lambda *_: None  # type: ignore[method-assign]
    tokens, stats = run(made, Options(100, None, ADVERSE, grammars={ANSWER: grammar}), planner)
    assert tokens == plain
    assert stats.sources[GRAMMAR].accepted == stats.sources[GRAMMAR].drafted > 15


def test_forbidden_drafts_are_cut_and_learned_as_rejected() -> None:
    """Of the drafts b, c, d, d after an a the third is forbidden."""
    a, b, c, d = (TOKENIZER.token_to_id(letter) for letter in "abcd")
    made = engine()
    made.draft = lambda last, count: [b, c, d, d][:count]  # type: ignore[method-assign]
    chooser = text_chooser(made, PROMPT, Sampling(), Rules(), {ANSWER: regex_grammar(vocabulary(), "a[b-c]{2,9}")})
    assert chooser
    chooser.commit(a)
    learned: list[Any] = []
    planner = DraftLength(8, Costs(8))
    for count in range(9):  # a long pass costs nothing, so as many are drafted as can be
        planner.costs.record(count, 1.0, 0.0)
        planner.costs.record(count, 1.0, 0.0)
    planner.learn = lambda *values: learned.append(values)  # type: ignore[method-assign]
    planned = PlannedDrafts(made, planner, PROMPT, chooser)
    assert planned.make(a, 4) == [b, c]
    recorded: list[Any] = []
    planner.costs.record = lambda *values: recorded.append(values)  # type: ignore[method-assign]
    planned.learn(Round([b, c], 2, [b, c, b], [0.0] * 3), 0.04, 1.0)
    assert recorded == [(2, 1.0, 0.02)]  # of four draft steps
    assert learned == [(DRAFTER, 3, 2)]
    planned.make(a, 4)
    planned.learn(Round([b, c], 1, [b, b], [0.0] * 2), 0.0, 1.0)
    assert learned[1:] == [(DRAFTER, 3, 1)]
    fixed = FixedDrafts(made, 3, chooser)
    assert (fixed.make(a, 8), fixed.source) == ([b, c], DRAFTER)


def test_the_end_is_allowed_where_the_grammar_may_end() -> None:
    grammar = regex_grammar(vocabulary(), "ab?")
    a, b = (TOKENIZER.token_to_id(letter) for letter in "ab")

    def allowed(*tokens: int) -> set[int]:
        text = grammar.begin(PartTracker({}))
        for token in tokens:
            text.commit(token)
        mask = text.mask()
        assert mask is not None
        return {token for token in range(VOCAB + BEYOND) if mask[token >> 3] >> (token & 7) & 1}

    assert allowed() == {a, TOKENIZER.token_to_id("<0x61>"), TOKENIZER.token_to_id("ab")} - {None}
    assert EOS not in allowed() and EOS in allowed(a)
    assert allowed(a, b) == {EOS}
    text = grammar.begin(PartTracker({}))
    text.commit(a)
    assert text.num_allowed([b, EOS]) >= 1 and text.num_allowed([EOS]) == 1 and text.num_allowed([a]) == 0
    text.commit(b)
    assert (text.forced(5), text.num_allowed([EOS, b]), text.num_allowed([b])) == ([EOS], 1, 0)


def test_a_grammar_binds_its_part_alone() -> None:
    grammar = regex_grammar(vocabulary(), "ab")
    a, b = (TOKENIZER.token_to_id(letter) for letter in "ab")
    begin, end = 700, 701
    text = grammar.begin(PartTracker({"thought": (begin, end)}, prompt=[begin, 5]))
    assert text.mask() is None and text.forced(4) == [] and text.num_allowed([9, 9]) == 2
    for token in (5, 6, end):
        text.commit(token)
    assert text.binds and text.num_allowed([a, b]) == 2 and text.num_allowed([begin]) == 0
    text.commit(a)
    assert text.num_allowed([a]) == 0 and text.num_allowed([b]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: json_grammar(v, "{"), r"the JSON schema is not valid JSON \(Expecting"),
        (lambda v: json_grammar(v, {"type": "text"}), r"the JSON schema cannot be used \(Invalid type: text\)"),
        (lambda v: json_grammar(v, {"not": {}}), "Unimplemented keys"),
        (lambda v: json_grammar(v, False), "the JSON schema is false, expected an object"),
        (lambda v: json_grammar(v, "[]"), r"the JSON schema is \[\], expected an object"),
        (lambda v: json_grammar(v, {"$ref": "#/nowhere"}), "does not exist"),
        (lambda v: json_grammar(v, {"a": {1, 2}}), "not valid JSON"),
        (lambda v: regex_grammar(v, "("), r"the regular expression cannot be used \(.*unclosed group"),
        (lambda v: regex_grammar(v, "a(?=b)"), "look-around"),
        (lambda v: regex_grammar(v, "\ud800"), "not valid UTF-8"),
        (lambda v: regex_grammar(v, r"[^\s\S]"), "the regular expression cannot be used"),
    ],
)
def test_what_cannot_be_used_is_one_line(make: Callable[[Vocabulary], Grammar], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        make(vocabulary())
    assert "\n" not in str(refused.value)


def test_rules_and_a_grammar_that_leave_nothing_are_an_error() -> None:
    grammar = regex_grammar(vocabulary(), "a")
    with pytest.raises(InputError, match="the rules allow no token at position"):
        run(engine(), Options(9, 0, Sampling(), Rules(frozenset([EOS])), {ANSWER: grammar}))


def test_spoilt_grammars_end_in_a_grammar_or_in_a_line() -> None:
    random.seed(4)
    sources = [json.dumps(schema) for schema in SCHEMAS.values()] + REGEXES
    for number in range(300):
        characters = list(sources[number % len(sources)])
        for _ in range(random.randint(1, 4)):
            characters[random.randrange(len(characters))] = random.choice('{}[]()"\\*+?:,|0a')
        make = json_grammar if number % len(sources) < len(SCHEMAS) else regex_grammar
        try:
            grammar = make(vocabulary(), "".join(characters))
        except InputError as error:
            assert "\n" not in str(error)
        else:
            grammar.begin(PartTracker({})).mask()


def test_on_the_command_line(run: Run, bundle: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(PERSON))
    command = ("generate", bundle("demo"), "--prompt", "Return the", "--max-new-tokens", 80, "--json")
    for more in (("--temperature", 0), ("--temperature", 1.5, "--seed", 4), ("--num-draft-tokens", 4)):
        code, out, _ = run(*command, "--json-schema", file, *more)
        speculative = json.loads(out)
        assert (code, speculative["finish_reason"]) == (0, "eos")
        jsonschema.validate(json.loads(speculative["text"]), PERSON)
        plain = json.loads(run(*command, "--json-schema", file, *more, "--mode", "plain")[1])
        assert plain["tokens"] == speculative["tokens"]
    assert speculative["drafts_by_source"]["grammar"]["accepted"] > 3
    text = json.loads(run(*command, "--regex", "( [a-z]+){3}!")[1])["text"]
    assert re.fullmatch("( [a-z]+){3}!", text)
    for wrong in (("--regex", "("), ("--json-schema", tmp_path / "none"), ("--logit-bias", "5=x")):
        code, _, err = run(*command, *wrong)
        assert (code, err.count("\n")) == (2, 1) or "Usage" in err


def test_rules_on_the_command_line(run: Run, bundle: Callable[..., Path]) -> None:
    command = ("generate", bundle("demo"), "--prompt", "Return the", "--max-new-tokens", 30, "--json")
    rules = ("--repetition-penalty", 1.2, "--presence-penalty", 0.5, "--frequency-penalty", -0.1)
    tokens = json.loads(run(*command)[1])["tokens"]
    more = ("--suppress", tokens[0], "--suppress", tokens[1], "--logit-bias", "300=2.5")
    ruled = [json.loads(run(*command, *rules, *more, "--mode", mode)[1])["tokens"] for mode in ("plain", "speculative")]
    assert ruled[0] == ruled[1] != tokens
    assert not {*tokens[:2]} & {*ruled[0]}
    assert "names a token twice" in run(*command, "--logit-bias", "3=1", "--logit-bias", "3=2")[2]


def test_chats_and_streams_take_a_grammar(chat_bundle: Path) -> None:
    decoder = open_decoder(chat_bundle, threads=1)
    stream = decoder.chat([{"role": "user", "content": "Hi"}], regex="(yes|no)", max_new_tokens=20)
    for _ in stream:
        pass
    assert stream.text in ("yes", "no") and stream.stats.finish_reason == "eos"


def test_llguidance_is_loaded_for_a_grammar_only(bundle: Callable[..., Path]) -> None:
    script = (
        "import sys; from runtime_ref import open_decoder; decoder = open_decoder(sys.argv[1]);"
        "list(decoder.stream('a', max_new_tokens=2, repetition_penalty=1.1)); assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, bundle("demo")], check=True)
