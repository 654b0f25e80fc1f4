"""Clusters of equal size."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from clustering.cluster_table import ClusterTable
from clustering.kmeans import _fill, default_clusters, equal_clusters


def rows(count: int, seed: int = 0, centers: int = 12) -> np.ndarray:
    """Rows [count, 16] float32, normally distributed around as many centers."""
    generator = np.random.default_rng(seed)
    means = 4 * generator.standard_normal((centers, 16))
    return (means[generator.integers(0, centers, count)] + generator.standard_normal((count, 16))).astype(np.float32)


def spread(embedding: np.ndarray, ordering: np.ndarray, clusters: int) -> float:
    """Mean square distance of rows from the mean of their cluster."""
    parts = [embedding[part] for part in np.array_split(ordering, clusters)]
    return float(np.mean(np.concatenate([((part - part.mean(0)) ** 2).sum(1) for part in parts])))


@pytest.mark.parametrize(("tokens", "clusters"), [(512, 32), (500, 32), (33, 32), (40, 40), (7, 1), (1, 1), (3000, 7)])
def test_each_token_is_in_one_of_equal_clusters(tokens: int, clusters: int) -> None:
    table = ClusterTable(np.zeros((clusters, 16), np.float32), equal_clusters(rows(tokens), clusters))
    table.check("made")
    members = table.members
    assert members.shape == (clusters, -(-tokens // clusters))
    different = [len(set(cluster)) for cluster in members.tolist()]
    assert sum(different) == tokens
    assert max(different) - min(different) <= 1


def test_rows_of_a_cluster_lie_close() -> None:
    """Nearly as close as in unequal clusters of scikit-learn, for rows around one center, which no sizes break up."""
    embedding = rows(2048, centers=1)
    equal = spread(embedding, equal_clusters(embedding, 64), 64)
    free = KMeans(64, n_init=1, random_state=0).fit(embedding).inertia_ / len(embedding)
    assert free < equal < 1.1 * free
    assert equal < 0.7 * spread(embedding, np.arange(len(embedding)), 64)


def test_depends_on_the_seed_alone() -> None:
    embedding = rows(600)
    assert np.array_equal(equal_clusters(embedding, 24, seed=3), equal_clusters(embedding, 24, seed=3))
    assert not np.array_equal(equal_clusters(embedding, 24, seed=3), equal_clusters(embedding, 24, seed=4))


def test_rows_that_would_lose_most_keep_their_place() -> None:
    """Three rows are nearest to the first of two centers, which takes two: the one in the middle moves."""
    embedding = np.array([[2.9], [-1], [0], [9]], np.float32)
    ordering = _fill(embedding, np.array([[0], [6]], np.float32), np.array([2, 2]))
    assert ordering.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("copied", [300, 1000], ids=["a third", "nearly all"])
def test_copies_of_one_row_stay_among_themselves(copied: int) -> None:
    """Thousands of unused tokens may share one embedding, zero for instance."""
    embedding = rows(1024)
    embedding[:copied] = 0
    mixed = [cluster for cluster in equal_clusters(embedding, 64).reshape(64, 16) if 0 < (cluster < copied).sum() < 16]
    assert len(mixed) <= 10  # of 64, where chance would mix 64 and 20


def test_default_is_googles_number() -> None:
    assert default_clusters(262144) == 2048
    assert default_clusters(1) == 1
