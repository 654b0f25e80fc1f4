"""How often the first stage keeps the best token, compared with the reference of two-stage logits."""

import numpy as np

from clustering.cluster_table import ClusterTable
from clustering.kmeans import equal_clusters
from clustering.recall import best_logits, cluster_ranks, fit_centroids, recall_curve
from runtime_ref.two_stage import two_stage_token

V, E, C = 203, 12, 24  # some clusters have a token twice


def drafter() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding rows of varying norms, members of their clusters, and states near some rows."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((V, E)) * np.exp(0.4 * generator.standard_normal((V, 1)))
    states = 3 * rows[generator.integers(0, V, 600)] + generator.standard_normal((600, E))
    rows, states = rows.astype(np.float32), states.astype(np.float32)
    return rows, ClusterTable(np.zeros((C, E), np.float32), equal_clusters(rows, C)).members, states


def test_a_token_survives_where_the_reference_chooses_it() -> None:
    rows, members, states = drafter()
    centroids = rows[members].mean(1)
    ranks = cluster_ranks(states, best_logits(states, rows, members), centroids)
    table = rows[members].reshape(C, -1)
    for state, rank in zip(states[:60], ranks, strict=False):
        best = int((rows @ state).argmax())
        survives = [two_stage_token(state, centroids, table, members, k) == best for k in range(1, C + 1)]
        assert survives == [k > rank for k in range(1, C + 1)]


def test_tied_centroids_rank_as_they_are_kept() -> None:
    rows = np.eye(4, dtype=np.float32)
    states, members = np.array([[0, 0, 1, 0]], np.float32), np.arange(4)[:, None]
    ranks = cluster_ranks(states, best_logits(states, rows, members), np.ones((4, 4), np.float32))
    assert ranks.tolist() == [2]
    assert recall_curve(ranks, 4).tolist() == [0, 0, 1, 1]


def test_fitted_centroids_find_more_than_means() -> None:
    """On states that they were not fitted on. Centroids that are fitted on noise stay close to the means."""
    rows, members, states = drafter()
    best, means = best_logits(states, rows, members), rows[members].mean(1)

    def recall(centroids: np.ndarray) -> float:
        return float(recall_curve(cluster_ranks(states[300:], best[300:], centroids), C)[2])

    assert recall(fit_centroids(states[:300], best[:300], means)) > recall(means) + 0.05
    noise = np.random.default_rng(1).standard_normal((40, E)).astype(np.float32)
    few = fit_centroids(noise, best_logits(noise, rows, members), means)
    assert recall(few) > recall(means) - 0.05


def test_blocks_do_not_matter() -> None:
    """More clusters than one block of logits holds."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((4096, 4)).astype(np.float32)
    members, states = generator.permutation(4096).reshape(256, 16), generator.standard_normal((9, 4)).astype(np.float32)
    steps: list[None] = []
    best = best_logits(states, rows, members, lambda: steps.append(None))
    assert np.allclose(best, (states @ rows.T)[:, members].max(2), atol=1e-6)
    assert len(steps) == 16
