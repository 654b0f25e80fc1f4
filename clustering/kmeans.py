"""Cluster vocabulary rows into clusters of equal size: k-means, then Lloyd's iteration with limited cluster sizes."""

import warnings
from collections.abc import Callable

import numpy as np

BALANCING_ITERATIONS = 10  # most rows stay where they are after five
_MAX_STAGES = 8  # of filling clusters; rows left then are mostly copies of one row, which may go anywhere
_MAX_SCORES = 1 << 23  # computed at once: 4096 rows at 2048 clusters, 32 MB


def default_clusters(vocab_size: int) -> int:
    """Return the default number of clusters: four times the root of the vocabulary size, rounded to a power of two.

    That is 2048 for Gemma's 262144 tokens, as in Google's drafters.

    Args:
        vocab_size: V.
    """
    return min(vocab_size, 2 ** round(np.log2(4 * vocab_size**0.5)))


def equal_clusters(
    rows: np.ndarray, num_clusters: int, seed: int = 0, progress: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Order tokens by cluster so that the rows of a cluster lie close; sizes are those of `ClusterTable`.

    scikit-learn's mini-batch k-means gives the first centers. Equal rows, which thousands of unused tokens have in some
    checkpoints, fill clusters nearly of their own.

    Args:
        rows: [V, E] float32, with finite norms.
        num_clusters: C, at most V.
        seed: of the k-means.
        progress: called after each of `1 + BALANCING_ITERATIONS` steps.

    Returns:
        Token ids grouped by cluster, [V] int64.
    """
    # Imported here: it takes a second, which other commands need not wait.
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    means = MiniBatchKMeans(
        num_clusters,
        init="random",
        n_init=1,
        batch_size=16384,
        max_iter=5,
        random_state=seed,
        compute_labels=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # when there are fewer different rows than clusters
        centers = means.fit(rows).cluster_centers_.astype(np.float32)
    progress()
    large = len(rows) % num_clusters
    room = np.full(num_clusters, len(rows) // num_clusters) + (np.arange(num_clusters) < large)
    ordering = _fill(rows, centers, room)
    progress()
    for _ in range(BALANCING_ITERATIONS - 1):
        centers = np.stack([rows[tokens].mean(0) for tokens in np.array_split(ordering, num_clusters)])
        ordering = _fill(rows, centers, room)
        progress()
    return ordering


def _fill(rows: np.ndarray, centers: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Token ids in the order of their clusters: each row in the nearest one, unless other rows would lose more.

    In stages, every row asks for the nearest cluster with room. A cluster takes the rows that would lose most in their
    second nearest cluster.

    Args:
        rows: [V, E] float32.
        centers: [C, E] float32.
        room: rows that each cluster takes, [C] int64; together V.
    """
    cluster, room, waiting = np.empty(len(rows), np.int64), room.copy(), np.arange(len(rows))
    for stage in range(_MAX_STAGES):
        open_clusters = np.flatnonzero(room)
        nearest, loss = _nearest(rows, waiting, centers[open_clusters])
        order = np.lexsort((-loss, nearest))
        waiting, requested = waiting[order], open_clusters[nearest[order]]
        if stage == _MAX_STAGES - 1:
            requested = np.repeat(open_clusters, room[open_clusters])
        place = np.arange(len(requested)) - np.searchsorted(requested, requested)  # in the queue for the cluster
        taken = place < room[requested]
        cluster[waiting[taken]] = requested[taken]
        room -= np.bincount(requested[taken], minlength=len(room))
        waiting = waiting[~taken]
        if not len(waiting):
            break
    return np.argsort(cluster, kind="stable")


def _nearest(rows: np.ndarray, tokens: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token the index of the nearest center, and how much nearer it is than the second nearest."""
    half_norms = (centers * centers).sum(1) / 2
    nearest, loss = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.float32)
    step = max(1, _MAX_SCORES // len(centers))
    for start in range(0, len(tokens), step):
        block = slice(start, start + step)
        scores = rows[tokens[block]] @ centers.T - half_norms  # the largest belongs to the smallest distance
        best = scores.argmax(1)
        at = np.arange(len(best)), best
        nearest[block], highest = best, scores[at]
        scores[at] = -np.inf
        loss[block] = highest - scores.max(1)
    return nearest, loss
