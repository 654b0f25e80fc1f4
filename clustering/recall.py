"""Fit centroids that find the best token's cluster, and measure how often they do by the number of clusters kept."""

from collections.abc import Callable

import numpy as np

DEFAULT_RECALL = 0.99  # fraction of states whose best token must be in a kept cluster
RIDGE_PENALTIES = (0.1, 0.3, 1, 3, 10, 100)  # relative to the states' mean square
_MAX_LOGITS = 1 << 25  # computed at once


def best_logits(
    states: np.ndarray, rows: np.ndarray, members: np.ndarray, progress: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Return the largest logit of each cluster.

    Args:
        states: [states, E] float32, of the drafter.
        rows: [V, E] float32, the drafter's output embedding.
        members: [C, M] int64, the token ids of each cluster.
        progress: called at most 16 times, in equal steps.

    Returns:
        [states, C] float32.
    """
    best = np.empty((len(states), len(members)), np.float32)
    # Blocks of states and of clusters: a cluster may be the whole vocabulary, or there may be V clusters.
    tall = max(1, min(len(states), _MAX_LOGITS // members.shape[1]))
    wide = max(1, min(-(-len(members) // 16), _MAX_LOGITS // (tall * members.shape[1])))
    reported = 0
    for start in range(0, len(members), wide):
        part = members[start : start + wide]
        some = rows[part.reshape(-1)].T
        for top in range(0, len(states), tall):
            logits = states[top : top + tall] @ some
            best[top : top + tall, start : start + wide] = logits.reshape(-1, *part.shape).max(2)
        if 16 * (start + len(part)) // len(members) > reported:
            reported += 1
            progress()
    return best


def fit_centroids(states: np.ndarray, best: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return centroids whose scores predict the largest logit of each cluster.

    A cluster's mean row scores its average token, but the first stage must find the cluster of the best one. So a ridge
    regression predicts what the means miss. Its penalty is chosen from `RIDGE_PENALTIES` by leave-one-out error; the
    largest leaves the means nearly as they are.

    Args:
        states: [states, E] float32, of the drafter.
        best: [states, C] float32, what `best_logits` returns for them.
        means: [C, E] float32, the mean row of each cluster.

    Returns:
        [C, E] float32.
    """
    from sklearn.linear_model import RidgeCV  # takes a second to import

    states = states.astype(np.float64)
    mean_square = float((states * states).sum()) / states.shape[1]
    ridge = RidgeCV([penalty * mean_square for penalty in RIDGE_PENALTIES], fit_intercept=False)
    return (means + ridge.fit(states, best - states @ means.T).coef_).astype(np.float32)


def cluster_ranks(states: np.ndarray, best: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return how many clusters the first stage ranks before the best token's; the lower of equal ones comes first.

    Args:
        states: [states, E] float32, of the drafter.
        best: [states, C] float32, what `best_logits` returns for them.
        centroids: [C, E] float32.

    Returns:
        [states] int64, 0 to C - 1.
    """
    scores = states @ centroids.T
    best_cluster = best.argmax(1)[:, None]
    own = np.take_along_axis(scores, best_cluster, 1)
    before = (scores > own) | ((scores == own) & (np.arange(len(centroids)) < best_cluster))
    return before.sum(1)


def recall_curve(ranks: np.ndarray, num_clusters: int) -> np.ndarray:
    """Return the recall of a first stage that keeps 1, 2, .. C clusters.

    Args:
        ranks: [states] int64, what `cluster_ranks` returns.
        num_clusters: C.

    Returns:
        [C] float64, the fraction of states whose best token is in a cluster that is kept.
    """
    return np.bincount(ranks, minlength=num_clusters).cumsum() / len(ranks)
