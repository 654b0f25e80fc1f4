"""Centroids that find the best token's cluster, and how often they do, against the number of clusters kept."""

from collections.abc import Callable

import numpy as np

PENALTIES = (0.1, 0.3, 1, 3, 10, 100)  # relative to the states' mean square
_BLOCK = 1 << 25  # logits computed at once


def best_logits(
    states: np.ndarray, rows: np.ndarray, members: np.ndarray, progress: Callable[[], None] = lambda: None
) -> np.ndarray:
    """The largest logit of each cluster, [N, C] float32, for states [N, E], embedding rows [V, E] and members [C, V/C].

    `progress` is called 16 times or less.
    """
    best = np.empty((len(states), len(members)), np.float32)
    # A cluster may be the whole vocabulary, and there may be as many clusters as tokens.
    tall = max(1, min(len(states), _BLOCK // members.shape[1]))
    wide = max(1, min(-(-len(members) // 16), _BLOCK // (tall * members.shape[1])))
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
    """Centroids [C, E] whose scores predict the largest logit of each cluster, from the clusters' mean rows on.

    A mean row scores the average token, but the first stage must find the best one. Ridge regression of what the
    means miss, over states [N, E] that the drafter produces and their best logits [N, C]. The penalty is chosen by
    leave-one-out error, up to one that all but leaves the means as they are.
    """
    from sklearn.linear_model import RidgeCV  # takes a second to import

    states = states.astype(np.float64)
    mean_square = float((states * states).sum()) / states.shape[1]
    ridge = RidgeCV([share * mean_square for share in PENALTIES], fit_intercept=False)
    return (means + ridge.fit(states, best - states @ means.T).coef_).astype(np.float32)


def cluster_ranks(states: np.ndarray, best: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """How many clusters the first stage puts before the best token's, [N] int64; of equal ones the lower first."""
    scores = states @ centroids.T
    wanted = best.argmax(1)[:, None]
    own = np.take_along_axis(scores, wanted, 1)
    before = (scores > own) | ((scores == own) & (np.arange(len(centroids)) < wanted))
    return before.sum(1)


def recall_curve(ranks: np.ndarray, num_clusters: int) -> np.ndarray:
    """Share of states whose best token survives a first stage that keeps 1, 2, .. C clusters, [C] float64."""
    return np.bincount(ranks, minlength=num_clusters).cumsum() / len(ranks)
