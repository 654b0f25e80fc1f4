"""Two-stage logits in numpy: the reference that every backend's graph is tested against."""

import numpy as np


def two_stage_token(
    hidden: np.ndarray, centroids: np.ndarray, clusters: np.ndarray, members: np.ndarray, top_k_clusters: int
) -> int:
    """Return the best token of the clusters whose centroids score highest.

    Ties go to the lowest cluster in the first stage and to the lowest token id in the second.

    Args:
        hidden: [E] float32, the drafter's state before its head.
        centroids: [C, E] float32.
        clusters: [C, M * E] float32, the embeddings of each cluster's tokens end to end.
        members: [C, M] int64, their token ids.
        top_k_clusters: how many clusters the first stage keeps, 1 to C.

    Returns:
        A token id.
    """
    kept = np.argsort(-(centroids @ hidden), kind="stable")[:top_k_clusters]
    logits = clusters[kept].reshape(-1, len(hidden)) @ hidden
    return int(members[kept].reshape(-1)[logits == logits.max()].min())
