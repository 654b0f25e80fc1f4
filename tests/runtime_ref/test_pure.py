"""The pure parts: noise, choosing, acceptance, two-stage logits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_ref.acceptance import accept
from runtime_ref.errors import InputError
from runtime_ref.sampling import Sampling, choose, uniform
from runtime_ref.two_stage import two_stage_token


def test_noise_is_splitmix64() -> None:
    # First outputs of SplitMix64 for seeds 0 and 1234567, as published with the algorithm.
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**24
    assert uniform(1234567, 0) == (6457827717110365317 >> 40) / 2**24


def test_noise_belongs_to_the_position() -> None:
    values = {uniform(seed, position) for seed in range(20) for position in range(50)}
    assert len(values) == 1000
    assert all(0 <= value < 1 for value in values)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=1e-9, seed=5)], ids=["greedy", "tiny top-p"])
def test_the_first_of_equal_logits_wins(sampling: Sampling) -> None:
    logits, ids = np.array([2.0, 2.0, 0.0], np.float32), np.array([9, 4, 7])
    assert {int(ids[choose(logits, position, sampling)]) for position in range(50)} == {9}


def test_a_tiny_temperature_is_greedy() -> None:
    logits, ids = np.array([2.0, 1.999, 0.0], np.float32), np.array([9, 4, 7])
    assert {int(ids[choose(logits, position, Sampling(1e-320))]) for position in range(50)} == {9}


@pytest.mark.parametrize("values", [(-1.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_impossible_sampling_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"expected"):
        Sampling(*values)


def test_sampling_follows_the_distribution() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    counts = np.bincount([choose(logits, p, Sampling(1.0, seed=3)) for p in range(20000)], minlength=4)
    chi_square = float(((counts - 20000 * probabilities) ** 2 / (20000 * probabilities)).sum())
    assert chi_square < 16.3  # 0.1 % point of chi-square with 3 degrees of freedom; seeded, so it does not flicker


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    chosen = {choose(logits, p, Sampling(1.0, top_p=0.7, seed=3)) for p in range(500)}
    assert chosen == {0, 1}


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), min_size=9, max_size=9))
def test_accept_keeps_the_longest_equal_prefix(drafts: list[int], choices: list[int]) -> None:
    choices = choices[: len(drafts) + 1]
    accepted, tokens = accept(drafts, choices)
    assert tokens == choices[: accepted + 1]
    assert drafts[:accepted] == choices[:accepted]
    assert accepted == len(drafts) or drafts[accepted] != choices[accepted]


def test_two_stage_is_the_best_token_of_the_kept_clusters() -> None:
    generator = np.random.default_rng(0)
    embedding = generator.standard_normal((24, 5)).astype(np.float32)
    members = generator.permutation(24).reshape(6, 4)
    centroids, clusters = embedding[members].mean(1), embedding[members].reshape(6, -1)
    for hidden in generator.standard_normal((50, 5)).astype(np.float32):
        kept = np.argsort(-(centroids @ hidden))[:2]
        candidates = members[kept].ravel()
        best = candidates[np.argmax(embedding[candidates] @ hidden)]
        assert two_stage_token(hidden, centroids, clusters, members, 2) == best
        everything = two_stage_token(hidden, centroids, clusters, members, 6)
        assert everything == np.argmax(embedding @ hidden)


def test_two_stage_ties_go_to_the_lowest_id() -> None:
    hidden, centroids = np.ones(2, np.float32), np.ones((3, 2), np.float32)
    clusters = np.ones((3, 4), np.float32)
    members = np.array([[5, 3], [1, 4], [0, 2]])
    assert two_stage_token(hidden, centroids, clusters, members, 2) == 1  # clusters 0 and 1 are kept, not 2
