"""Sampling: the test vectors of all languages, and the distribution of drafted texts, which is the target's."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2, chisquare

from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling, choose, log_probabilities, uniform
from runtime_ref.stats import Stats
from tests.vectors import make_sampling

PROMPT = [2, 525, 378]
VECTORS = json.loads(make_sampling.FILE.read_text())


def test_the_vectors_are_those_of_their_script() -> None:
    assert make_sampling.FILE.read_text() == make_sampling.text()
    assert len(VECTORS["choose"]) > 150


@pytest.mark.parametrize("row", VECTORS["noise"], ids=lambda row: f"{row['seed']}-{row['position']}")
def test_noise(row: dict) -> None:
    assert uniform(int(row["seed"]), row["position"]) * 2**24 == row["u_times_2_to_the_24"]


def test_chosen_tokens() -> None:
    for number, row in enumerate(VECTORS["choose"]):
        sampling = Sampling(row["temperature"], row["top_p"], int(row["seed"]), row["top_k"])
        rank = choose(np.array(row["logits"], np.float32), row["position"], sampling)
        assert row["ids"][rank] == row["token"], f"row {number}"


def test_top_k_keeps_the_largest() -> None:
    logits = np.zeros(64, np.float32)
    chosen = {choose(logits, position, Sampling(1.0, seed=1, top_k=3)) for position in range(300)}
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, 65, 1000])
def test_top_k_is_within_what_a_bundle_gives(top_k: int) -> None:
    with pytest.raises(InputError, match=rf"top-k is {top_k}, expected 1 to 64: a bundle gives no more"):
        Sampling(top_k=top_k)


def test_log_probabilities() -> None:
    logprobs = log_probabilities(np.log(np.array([[0.5, 0.3, 0.2]], np.float32)))
    assert np.exp(logprobs) == pytest.approx(np.array([[0.5, 0.3, 0.2]]))
    assert np.isfinite(log_probabilities(np.array([3e38, -3e38], np.float32))).all()


@pytest.fixture(scope="module")
def engine(bundle: Callable[[str], Path]) -> GraphEngine:
    path = bundle("demo")
    return load_engine(path, replace(read_manifest(path), eos=frozenset()), threads=1)


@pytest.mark.parametrize("seeds", [250, pytest.param(600, marks=pytest.mark.slow)])
def test_many_seeds_have_the_targets_distribution(engine: GraphEngine, seeds: int) -> None:
    """The fourth token of drafted texts, against its exact probability: a sum over all texts before it."""
    sampling = Sampling(0.8, 0.9, top_k=4)
    exact = Counter[int]()

    def spread(text: list[int], chance: float, left: int) -> None:
        engine.prefill(text[:-1], sampling)
        logits, ids, _ = engine.run_target(text[-1:], [0])
        weights = np.exp((logits[0, :4].astype(float) - logits[0, 0]) / 0.8)
        weights /= weights.sum()
        kept = int(np.searchsorted(np.cumsum(weights), 0.9)) + 1
        for token, weight in zip(ids[0, :kept], weights[:kept] / weights[:kept].sum(), strict=True):
            if left == 1:
                exact[int(token)] += chance * weight
            else:
                spread([*text, int(token)], chance * weight, left - 1)

    prompt = PROMPT
    spread(prompt, 1.0, 4)
    assert sum(exact.values()) == pytest.approx(1)
    drafted, stats = Counter[int](), Stats()
    for seed in range(seeds):
        options = Options(4, 3, Sampling(0.8, 0.9, seed, 4))
        drafted[list(generate(engine, prompt, options, stats))[-1]] += 1
    assert stats.accepted > seeds / 2
    assert drafted.keys() <= exact.keys()
    common = [token for token, chance in exact.items() if chance * seeds >= 5]
    rest = 1 - sum(exact[token] for token in common)
    counts = [*(drafted[token] for token in common), seeds - sum(drafted[token] for token in common)]
    expected = [*(exact[token] * seeds for token in common), max(rest * seeds, 1e-9)]
    assert len(common) > 5
    assert chisquare(counts, np.array(expected) * (seeds / sum(expected))).statistic < chi2.ppf(0.999, len(common))
