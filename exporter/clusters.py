"""Make the clusters of a drafter's two-stage head, and say how often its first stage keeps the best token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from clustering.kmeans import ITERATIONS, equal_clusters
from clustering.recall import best_logits, cluster_ranks, fit_centroids, recall_curve
from clustering.table import ClusterTable
from exporter.checkpoint import DRAFTER_EMBEDDING, Checkpoint, read_cluster_table
from exporter.config import DrafterConfig
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

RECALL = 0.99  # that a default number of clusters must reach
MIN_STATES = 1024  # half of them judge: with fewer, one in a hundred is a matter of luck
MAX_STATES = 16384

# Steps that `make_clusters` reports.
STEPS = 1 + ITERATIONS + 16


@dataclass(frozen=True)
class Clustering:
    """Clusters, how many of them to keep, and the recall [C] of keeping 1, 2, .. C, on states nothing was fitted on.

    `checkpoint_recall` is that of the clusters which the drafter's checkpoint has, on the same states.
    """

    table: ClusterTable
    top_k: int
    recall: np.ndarray
    num_states: int
    checkpoint_recall: np.ndarray | None

    def facts(self) -> dict[str, Any]:
        """Everything but the table itself, for people and machines."""
        sizes, tokens = self.table.sizes(self.top_k), len(self.table.token_ordering)
        theirs = self.checkpoint_recall
        curve = []
        for k in sorted({2**i for i in range(len(self.recall).bit_length())} | {self.top_k, len(self.recall)}):
            scored = min(k * sizes.cluster_size, tokens)
            row = {"top_k_clusters": k, "tokens_scored": scored, "recall": float(self.recall[k - 1])}
            row["share_of_dense_head"] = (sizes.num_clusters + scored) / tokens
            if theirs is not None:  # at as many tokens, if a cluster of theirs is not larger than that
                as_many = scored * len(theirs) // tokens
                row["checkpoint_recall"] = float(theirs[as_many - 1]) if as_many else None
            curve.append(row)
        return {
            "num_clusters": sizes.num_clusters,
            "cluster_size": sizes.cluster_size,
            "top_k_clusters": self.top_k,
            "recall": float(self.recall[self.top_k - 1]),
            "checkpoint_clusters": None if theirs is None else len(theirs),
            "num_states": self.num_states,
            "curve": curve,
        }


def make_clusters(
    checkpoint: Checkpoint,
    config: DrafterConfig,
    states: np.ndarray,
    num_clusters: int,
    recall: float = RECALL,
    top_k: int | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Clustering:
    """Cluster a drafter's output embedding.

    Args:
        states: [N, E] float32, of the drafter before its head. Centroids are fitted on the first half; the second
            half, of other tokens, judges them.
        num_clusters: C, at most V.
        recall: share of states whose best token must survive, where `top_k` does not say how many clusters to keep.
        progress: told of `STEPS` steps.

    Raises:
        InputError: too few states, or more clusters than tokens.
    """
    if len(states) < MIN_STATES:
        raise InputError(
            f"the prompts give {len(states)} states to fit and judge clusters by, expected {MIN_STATES} or more; give"
            " longer prompts, four states come of each token"
        )
    states = states[np.linspace(0, len(states) - 1, min(len(states), MAX_STATES)).astype(np.int64)]
    half = len(states) // 2
    rows = checkpoint.load(DRAFTER_EMBEDDING).numpy()
    ordering = equal_clusters(rows, num_clusters, seed, lambda: progress("k-means", 1))
    means = np.stack([rows[tokens].mean(0) for tokens in np.array_split(ordering, num_clusters)])
    members = ClusterTable(means, ordering).members
    best = best_logits(states, rows, members, lambda: progress("recall", 1))
    table = ClusterTable(fit_centroids(states[:half], best[:half], means), ordering)
    curve = recall_curve(cluster_ranks(states[half:], best[half:], table.centroids), num_clusters)
    theirs = read_cluster_table(checkpoint, config)
    if theirs is not None:
        ranks = cluster_ranks(states[half:], best_logits(states[half:], rows, theirs.members), theirs.centroids)
    return Clustering(
        table=table,
        top_k=int(np.searchsorted(curve, recall)) + 1 if top_k is None else top_k,
        recall=curve,
        num_states=len(states) - half,
        checkpoint_recall=None if theirs is None else recall_curve(ranks, len(theirs.centroids)),
    )
