"""Speculative decoding on real bundles gives the tokens of plain decoding, whatever is drafted."""

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.graphs.spec import PREFILL_CHUNK_TOKENS
from runtime_ref.cache import CACHE_STEP_ROWS
from runtime_ref.costs import Costs
from runtime_ref.decoder import Options, generate
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import load_engine
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import read_manifest
from runtime_ref.rules import Rules
from runtime_ref.sampling import Sampling, choose
from runtime_ref.stats import Stats
from tests.exports import SMALL_BUNDLES

MISTAKES = (0.0, 0.3, 1.0)  # of the drafts: all are accepted, every pattern occurs, none is
LONG = PREFILL_CHUNK_TOKENS + 1
GREEDY, SAMPLED = Sampling(), Sampling(0.8, 0.95, seed=11)


class ScriptedEngine(GraphEngine):
    """Drafts a known continuation, each token wrong with probability `mistakes`, so every acceptance pattern occurs."""

    path: Path
    answer: tuple[int, ...] = ()
    prompt_length = 0
    mistakes = 0.0

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        at = self.position + 1 - self.prompt_length
        right = (*self.answer, *([0] * num_draft_tokens))[at : at + num_draft_tokens]
        return [(t + 1) % self.manifest.vocab_size if random.random() < self.mistakes else t for t in right]


# Without `tiny`: rounds do not see whether some layers are KV-shared, and it has no part that the others lack.
@pytest.fixture(params=[names for names in SMALL_BUNDLES if "tiny" not in names], ids="-".join)
def engine(request: pytest.FixtureRequest, bundle: Callable[..., Path]) -> ScriptedEngine:
    return scripted(bundle(*request.param))


@functools.cache
def loaded(path: Path, plain: bool) -> GraphEngine:
    """Load a bundle once for plain decoding and once for the rest: of engines with the same graphs one runs at a time.

    No token ends its answers.
    """
    engine = load_engine(path, replace(read_manifest(path), eos=frozenset()), threads=1)
    assert isinstance(engine, GraphEngine)
    return engine


def scripted(path: Path, plain: bool = False) -> ScriptedEngine:
    base = loaded(path, plain)
    engine = ScriptedEngine(base.manifest, base.graphs, base.tables)
    engine.path = path
    return engine


def prompt_of(engine: GraphEngine, length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, engine.manifest.vocab_size, length).tolist()


def run(
    engine: GraphEngine, prompt: list[int], options: Options, planner: DraftLength | None = None
) -> tuple[list[int], Stats]:
    stats = Stats()
    return list(generate(engine, prompt, options, stats, planner)), stats


PLAIN: dict[tuple[object, ...], list[int]] = {}


def plainly(engine: ScriptedEngine, prompt: list[int], options: Options) -> list[int]:
    """The tokens of plain decoding, with a cache that has held nothing else; they are kept for the other mistakes."""
    key = engine.path, tuple(prompt), options.max_new_tokens, options.sampling
    if key not in PLAIN:
        PLAIN[key] = run(scripted(engine.path, plain=True), prompt, options)[0]
    return PLAIN[key]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("length", "mistakes"),
    [
        *((1, mistakes) for mistakes in MISTAKES),
        *((length, 0.3) for length in (5, LONG)),
        *(pytest.param(length, mistakes, marks=pytest.mark.slow) for length in (5, LONG) for mistakes in (0.0, 1.0)),
    ],
)
def test_speculative_equals_plain(engine: ScriptedEngine, sampling: Sampling, length: int, mistakes: float) -> None:
    """Accept-all, mixed and accept-none, past the window, across a growth of the cache for the long prompt."""
    random.seed(length)
    prompt = prompt_of(engine, length)
    budget = 40 if length < PREFILL_CHUNK_TOKENS else CACHE_STEP_ROWS + 10 - length
    plain = plainly(engine, prompt, Options(budget, 0, sampling))
    engine.answer, engine.prompt_length, engine.mistakes = tuple(plain), len(prompt), mistakes
    for drafts in (1, 4, 8):
        actual, stats = run(engine, prompt, Options(budget, drafts, sampling))
        assert actual == plain, f"{drafts} drafts"
        assert stats.acceptance_rate == {0.0: 1.0, 1.0: 0.0}.get(mistakes, pytest.approx(0.5, abs=0.45))
    planner = DraftLength(8, Costs(8, engine.manifest.row_multiple))
    for repeated in (False, True):  # prompt lookup finds matches in a prompt that is repeated
        start = prompt * 2 if repeated and 2 * length + budget < engine.manifest.max_seq_len else prompt
        expected = plainly(engine, start, Options(budget, 0, sampling))
        engine.answer, engine.prompt_length = tuple(expected), len(start)
        assert run(engine, start, Options(budget, None, sampling), planner)[0] == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_speculative_equals_plain_under_rules(engine: ScriptedEngine, sampling: Sampling) -> None:
    """Also where logits of other tokens come from the state of a row of a verify pass."""
    random.seed(1)
    rules = Rules(frozenset(range(5)), {7: 3.0, 8: -2.0}, 0.9, 0.5, -0.1)
    prompt = prompt_of(engine, 5)
    plain, _ = run(engine, prompt, Options(60, 0, sampling, rules))
    assert plain != run(engine, prompt, Options(60, 0, sampling))[0]
    engine.answer, engine.prompt_length, engine.mistakes = tuple(plain), len(prompt), 0.3
    for drafts in (3, 8):
        actual, stats = run(engine, prompt, Options(60, drafts, sampling, rules))
        assert actual == plain
        assert 0 < stats.accepted < stats.drafted


def test_end_tokens_stop_inside_a_draft(engine: ScriptedEngine) -> None:
    prompt = prompt_of(engine, 6)
    plain, _ = run(engine, prompt, Options(30, 0))
    engine.answer, engine.prompt_length = tuple(plain), len(prompt)
    for end in sorted(set(plain)):
        engine.manifest = replace(engine.manifest, eos=frozenset({end}))
        actual, stats = run(engine, prompt, Options(30, 4))
        assert actual == plain[: plain.index(end) + 1]
        assert stats.finish_reason == "eos"
        assert stats.accepted <= len(actual)


def test_up_to_max_seq_len(engine: ScriptedEngine) -> None:
    room = engine.manifest.max_seq_len
    for length in (room - 40, room - 1):
        prompt = prompt_of(engine, length)
        plain, plain_stats = run(engine, prompt, Options(99, 0))
        engine.answer, engine.prompt_length = tuple(plain), len(prompt)
        actual, stats = run(engine, prompt, Options(99, 8))
        assert actual == plain
        assert len(plain) == room - length
        assert stats.finish_reason == plain_stats.finish_reason == "max_seq_len"


def test_an_engine_can_be_used_again(engine: ScriptedEngine) -> None:
    """Rows of a longer text that are left in the cache do not change a shorter one."""
    first, _ = run(engine, prompt_of(engine, 3), Options(10, 0))
    run(engine, prompt_of(engine, 120), Options(30, 0))
    assert run(engine, prompt_of(engine, 3), Options(10, 0))[0] == first


def test_noise_of_a_sampled_token_is_that_of_its_index(backend: str, bundle: Callable[..., Path]) -> None:
    """FORMAT.md: the token at index p of the whole text is chosen with the noise of p, prompt included."""
    engine = scripted(bundle("odd", backend))
    text = prompt_of(engine, 5)
    tokens, _ = run(engine, text, Options(12, 3, SAMPLED))
    for token in tokens:
        engine.cache.roll_back(0)
        logits, ids, _ = engine.run_target(text, [len(text) - 1])
        assert token == ids[0][choose(logits[0], len(text), SAMPLED)]
        text.append(token)
