"""Vocabulary rows into clusters of equal size: scikit-learn's k-means, then Lloyd's iteration with limited room."""

import warnings
from collections.abc import Callable

import numpy as np

ITERATIONS = 10  # of balancing; most rows stay where they are after five
_STAGES = 8  # of filling clusters; what is left then is mostly copies of one row, which may go anywhere
_SCORES = 1 << 23  # computed at once: 4096 rows at 2048 clusters, 32 MB


def default_clusters(vocab_size: int) -> int:
    """Four times the root of the vocabulary, as a power of two: 2048 for Gemma's 262144, as in Google's drafters."""
    return min(vocab_size, 2 ** round(np.log2(4 * vocab_size**0.5)))


def equal_clusters(
    rows: np.ndarray, num_clusters: int, seed: int = 0, progress: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Order tokens by cluster, V/C to each as `ClusterTable` has them, so that the rows of a cluster lie close.

    Rows that are all alike, thousands of unused tokens in some checkpoints, fill clusters nearly of their own.

    Args:
        rows: [V, E] float32, with finite norms.
        num_clusters: C, at most V.
        progress: called after each of `1 + ITERATIONS` steps.

    Returns:
        Token ids [V] int64.
    """
    # Importing it takes a second, which other commands need not wait.
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
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
        centers = means.fit(rows).cluster_centers_.astype(np.float32)
    progress()
    large = len(rows) % num_clusters
    room = np.full(num_clusters, len(rows) // num_clusters) + (np.arange(num_clusters) < large)
    ordering = _fill(rows, centers, room)
    progress()
    for _ in range(ITERATIONS - 1):
        centers = np.stack([rows[tokens].mean(0) for tokens in np.array_split(ordering, num_clusters)])
        ordering = _fill(rows, centers, room)
        progress()
    return ordering


def _fill(rows: np.ndarray, centers: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Token ids in the order of their clusters: each row in the nearest one, unless others need its place more.

    In stages: every row asks for the nearest cluster with room, and of those that ask a cluster takes the rows that
    would lose most if they had to go to their next one.
    """
    cluster, room, waiting = np.empty(len(rows), np.int64), room.copy(), np.arange(len(rows))
    for stage in range(_STAGES):
        open_clusters = np.flatnonzero(room)
        nearest, loss = _nearest(rows, waiting, centers[open_clusters])
        order = np.lexsort((-loss, nearest))
        waiting, wanted = waiting[order], open_clusters[nearest[order]]
        if stage == _STAGES - 1:
            wanted = np.repeat(open_clusters, room[open_clusters])
        place = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)  # in the queue for the cluster
        taken = place < room[wanted]
        cluster[waiting[taken]] = wanted[taken]
        room -= np.bincount(wanted[taken], minlength=len(room))
        waiting = waiting[~taken]
        if not len(waiting):
            break
    return np.argsort(cluster, kind="stable")


def _nearest(rows: np.ndarray, tokens: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token the index of the nearest center, and how much nearer it is than the second nearest."""
    half_norms = (centers * centers).sum(1) / 2
    nearest, loss = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.float32)
    step = max(1, _SCORES // len(centers))
    for start in range(0, len(tokens), step):
        block = slice(start, start + step)
        scores = rows[tokens[block]] @ centers.T - half_norms  # the largest belongs to the smallest distance
        best = scores.argmax(1)
        at = np.arange(len(best)), best
        nearest[block], highest = best, scores[at]
        scores[at] = -np.inf
        loss[block] = highest - scores.max(1)
    return nearest, loss
