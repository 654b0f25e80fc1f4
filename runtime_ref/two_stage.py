"""Two-stage logits in numpy: the definition that every backend's graph is tested against."""

import numpy as np


def two_stage_token(
    hidden: np.ndarray, centroids: np.ndarray, clusters: np.ndarray, members: np.ndarray, k: int
) -> int:
    """The best token of the k clusters whose centroids score highest.

    Ties go to the lowest cluster in the first stage and to the lowest token id in the second.

    Args:
        hidden: [E] float32, the drafter's state before its head.
        centroids: [C, E] float32.
        clusters: [C, V/C * E] float32, the embeddings of each cluster's tokens end to end.
        members: [C, V/C] int64, their token ids.
    """
    kept = np.argsort(-(centroids @ hidden), kind="stable")[:k]
    logits = clusters[kept].reshape(-1, len(hidden)) @ hidden
    return int(members[kept].reshape(-1)[logits == logits.max()].min())
