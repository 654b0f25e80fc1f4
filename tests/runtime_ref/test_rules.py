"""Rules before the choice: vectors of all languages, transformers' processors, and plain = speculative under each."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor, SuppressTokensLogitsProcessor

from runtime_ref.costs import Costs
from runtime_ref.decoder import Options
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.rules import RuledChooser, Rules
from runtime_ref.sampling import Sampling
from tests.runtime_ref.hashed import NUM_LOGITS, PROMPT, HashedEngine, run
from tests.vectors import make_rules

VOCAB = 200
VECTORS = json.loads(make_rules.FILE.read_text())
SAMPLED = Sampling(1.2, 0.97, seed=5)
FREQUENT = list(range(0, VOCAB, 3))
EACH_RULE = {
    "none": Rules(),
    "suppressed": Rules(frozenset(FREQUENT)),
    "bias": Rules(logit_bias={7: 9.0, 8: -4.0, 150: 6.5}),
    "repetition": Rules(repetition_penalty=1.2),
    "repetition that raises": Rules(repetition_penalty=0.98),
    "presence": Rules(presence_penalty=1.0),
    "presence that raises": Rules(presence_penalty=-0.5),
    "frequency": Rules(frequency_penalty=0.01),
    "frequency that raises": Rules(frequency_penalty=-0.001),
    "all": Rules(frozenset(FREQUENT), {7: 9.0, 8: -4.0}, 1.05, 0.5, 0.004),
}
STRONG = EACH_RULE | {
    "strong repetition": Rules(repetition_penalty=30.0),
    "strong frequency": Rules(frequency_penalty=2.0),
    "strong frequency that raises": Rules(frequency_penalty=-2.0),
    "biases on all that is likely": Rules(logit_bias=dict.fromkeys(range(20, VOCAB), -60.0)),
}
# Rules by which tokens are chosen that are not among the bundle's.
BEYOND = ("bias", "all", "strong repetition", "biases on all that is likely")


def chooser(rules: Rules, prompt: list[int], score: Callable, sampling: Sampling = Sampling()) -> RuledChooser:
    return RuledChooser(sampling, rules, prompt, VOCAB, score)


def test_the_vectors_are_those_of_their_script() -> None:
    assert make_rules.FILE.read_text() == make_rules.text()
    assert len(VECTORS["choose"]) > 200


def test_vectors() -> None:
    for number, row in enumerate(VECTORS["choose"]):
        logits = np.array(VECTORS["logits"][row["logits"]], np.float32)
        ids = np.lexsort((np.arange(len(logits)), -logits))[: row["num_given"]]
        values = dict(row["rules"])
        biases = {int(token): bias for token, bias in values.pop("logit_bias").items()}
        rules = Rules(frozenset(values.pop("suppressed")), biases, **values)
        sampling = Sampling(row["temperature"], row["top_p"], int(row["seed"]), row["top_k"])
        ruled = RuledChooser(sampling, rules, row["prompt"], len(logits), lambda _, ids, all_=logits: all_[ids])
        for token in row["answer"]:
            ruled.commit(token)
        assert ruled.pick(logits[ids], ids, np.empty(0), row["position"])[0] == row["token"], f"row {number}"


@pytest.mark.parametrize("name", STRONG)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """The largest logit of the whole vocabulary, after processors that we did not write; OpenAI's penalties by hand."""
    engine, rules = HashedEngine(VOCAB, seed=3), STRONG[name]
    ruled, answer = chooser(rules, PROMPT, engine.score), list[int]()
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)]
    if rules.logit_bias:
        biases = {(token,): bias for token, bias in rules.logit_bias.items()}
        processors.insert(0, SequenceBiasLogitsProcessor(biases))
    processors.append(SuppressTokensLogitsProcessor(sorted(rules.suppressed)))
    beyond = 0
    for i in range(400 if name in BEYOND else 150):
        row = i
        scores, counts = torch.tensor(engine.all_logits[row])[None].double(), Counter(answer)
        for processor in processors:
            scores = processor(torch.tensor([[*PROMPT, *answer]]), scores)
        for token, count in counts.items():
            scores[0, token] -= rules.frequency_penalty * count + rules.presence_penalty
        token, logprob = ruled.pick(engine.all_logits[row][engine.ids[row]], engine.ids[row], engine.states[row], i)
        assert token == int(scores.argmax()), i
        largest = torch.tensor(np.sort(engine.all_logits[row])[-NUM_LOGITS:]).double()
        assert logprob == pytest.approx(float(engine.all_logits[row, token] - largest.logsumexp(0)))
        beyond += token not in engine.ids[row]
        answer.append(token)
    assert beyond or name not in BEYOND


@pytest.mark.parametrize("budget", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rules", EACH_RULE.values(), ids=EACH_RULE)
def test_sampled_tokens_are_those_of_plain_decoding(rules: Rules, budget: int) -> None:
    engine = HashedEngine(VOCAB)
    plain, _ = run(engine, Options(budget, 0, SAMPLED, rules))
    assert len(plain) == budget
    assert not rules.suppressed & set(plain)
    engine.answer = plain
    speculative, stats = run(engine, Options(budget, 5, SAMPLED, rules))
    assert speculative == plain
    assert stats.acceptance_rate is not None and 0.1 < stats.acceptance_rate < 0.9
    planned, _ = run(engine, Options(budget // 10, None, SAMPLED, rules), DraftLength(8, Costs(8)))
    assert planned == plain[: budget // 10]
    if rules != Rules():
        assert plain[:500] != run(engine, Options(500, 0, SAMPLED))[0]


def test_suppressed_drafts_are_not_verified() -> None:
    engine = HashedEngine(VOCAB)
    rules = Rules(frozenset(FREQUENT))
    plain, _ = run(engine, Options(300, 0, SAMPLED, rules))
    engine.draft = lambda last, count: [1, 2, 3, 4][:count]  # type: ignore[method-assign]
    drafted = run(engine, Options(300, 4, SAMPLED, rules))
    assert drafted[0] == plain
    assert set(drafted[1].drafted_lengths) == {0, 1, 2}  # 3 is suppressed; before the end there is room for fewer


def test_what_the_bundle_suppresses_is_not_chosen() -> None:
    """Also where the rules leave so few tokens that all of the vocabulary are looked at."""
    engine = HashedEngine(VOCAB)
    left = [5, 17, 23]
    rules = Rules(frozenset(range(VOCAB)) - set(left))
    assert set(run(engine, Options(50, 0, SAMPLED, rules))[0]) == set(left)
    engine.manifest.raw["tokens"]["suppressed"] = [17, VOCAB + 9]  # type: ignore[index]
    assert set(run(engine, Options(50, 0, SAMPLED, rules))[0]) == {5, 23}
    engine.manifest.raw["tokens"]["suppressed"] = left  # type: ignore[index]
    with pytest.raises(InputError, match="the rules allow no token at position 3 of the text"):
        run(engine, Options(50, 0, SAMPLED, rules))


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_scores_are_the_graphs_own(recipe: str, bundle: Callable[..., Path]) -> None:
    """From state and mapped head; in int4 the graph rounds what it multiplies with the head to 8 bits."""
    path = bundle("demo", "onnx", recipe)
    engine = load_engine(path, read_manifest(path), threads=1)
    logits, ids, states = engine.run_target([2, 525, 378, 812, 719, 273], range(6))
    for row, tokens, state in zip(logits, ids, states, strict=True):
        assert np.abs(engine.score(state, tokens.tolist()) - row).max() < {"fp32": 1e-5, "int4": 0.5}[recipe]


def test_a_neutral_rule_changes_no_bit() -> None:
    engine = HashedEngine(VOCAB)
    ruled = chooser(Rules(logit_bias={3: 0.0}), PROMPT, engine.score, SAMPLED)
    for i in range(200):
        row = engine.all_logits[i][engine.ids[i]], engine.ids[i], engine.states[i], i
        assert ruled.pick(*row) == SAMPLED.pick(*row)
