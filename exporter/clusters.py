"""Make the clusters of a drafter's two-stage head, and say how often its first stage keeps the best token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clustering.cluster_table import ClusterTable, TwoStageSizes
from clustering.kmeans import BALANCING_ITERATIONS, default_clusters, equal_clusters
from clustering.recall import best_logits, cluster_ranks, fit_centroids, recall_curve
from exporter.checkpoint import DRAFTER_EMBEDDING, Checkpoint, read_cluster_table
from exporter.config import read_drafter_config
from exporter.pair import Pair
from exporter.states import drafting_states, lone_states, prompt_passes, random_prompts
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

MIN_STATES = 1024  # half of them judge: with fewer, one in a hundred is a matter of luck
MAX_STATES = 16384


@dataclass(frozen=True)
class ClusterOptions:
    """What the user chose.

    No `num_clusters` means the default for the vocabulary; no `top_k` means as few as keep the best token of a share
    `recall` of the states.
    """

    num_clusters: int | None = None
    top_k: int | None = None
    recall: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Clustering:
    """Clusters, how many of them to keep, and the recall [C] of keeping 1, 2, .. C, on states nothing was fitted on.

    `states` says where those came from, and `checkpoint_recall` is that of the clusters which the drafter's checkpoint
    has, on the same states.
    """

    table: ClusterTable
    top_k: int
    recall: np.ndarray
    num_states: int
    states: str
    checkpoint_recall: np.ndarray | None

    @property
    def share_of_dense_head(self) -> float:
        """Multiplications of both stages, as a share of the dense head's."""
        return float(work(len(self.table.token_ordering), len(self.recall))[self.top_k - 1])

    def facts(self) -> dict[str, Any]:
        """Everything but the table itself, for people and machines."""
        sizes, tokens = self.table.sizes(self.top_k), len(self.table.token_ordering)
        theirs, shares = self.checkpoint_recall, work(tokens, len(self.recall))
        curve = []
        for k in sorted({2**i for i in range(len(self.recall).bit_length())} | {self.top_k, len(self.recall)}):
            scored = min(k * sizes.cluster_size, tokens)
            row = {"top_k_clusters": k, "tokens_scored": scored, "recall": float(self.recall[k - 1])}
            row["share_of_dense_head"] = float(shares[k - 1])
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
            "states": self.states,
            "curve": curve,
        }


def work(vocab_size: int, num_clusters: int) -> np.ndarray:
    """Multiplications of both stages that keep 1, 2, .. C clusters, as a share of the dense head's, [C] float64."""
    size = TwoStageSizes.of(vocab_size, num_clusters, 1).cluster_size
    return (num_clusters + size * np.arange(1, num_clusters + 1)) / vocab_size


def cluster_steps(pair: Pair | None, prompts: Sequence[Sequence[int]]) -> int:
    """How many steps `make_clusters` reports."""
    passes = 0 if pair is None else prompt_passes(prompts or random_prompts(pair.target))
    return passes + 1 + BALANCING_ITERATIONS + 16


def make_clusters(
    drafter_dir: Path,
    pair: Pair | None,
    options: ClusterOptions = ClusterOptions(),
    prompts: Sequence[Sequence[int]] = (),
    progress: Progress = lambda *_: None,
) -> Clustering:
    """Cluster a drafter's output embedding. Of the states, the first half fits centroids and the second judges them.

    Args:
        drafter_dir: its checkpoint.
        pair: the same drafter with its target, to judge by states of real drafting; without it the drafter runs alone.
        prompts: token ids to draft on with the target, random ones if there are none.
        progress: told of `cluster_steps` steps.

    Raises:
        InputError: an unusable checkpoint, too few states, or more clusters than tokens.
    """
    config, checkpoint = read_drafter_config(drafter_dir), Checkpoint(drafter_dir)
    vocab_size = config.text.vocab_size
    clusters = default_clusters(vocab_size) if options.num_clusters is None else options.num_clusters
    TwoStageSizes.of(vocab_size, clusters, 1 if options.top_k is None else options.top_k)  # refuses what cannot be
    theirs = read_cluster_table(checkpoint, config)
    if pair is None:
        states, source = lone_states(checkpoint, config).numpy(), "the drafter alone on random input"
    else:
        _check_prompts(prompts, pair)
        source = "drafting on the prompts" if prompts else "drafting on random prompts"
        prompts = prompts or random_prompts(pair.target)
        states = drafting_states(pair.dense, prompts, lambda: progress("drafting", 1)).numpy()
    if not np.isfinite(states).all():
        raise InputError(f"{drafter_dir}: its states are not finite while it drafts; restore both checkpoints")
    if (different := len(np.unique(states, axis=0))) < MIN_STATES:
        raise InputError(
            f"{drafter_dir}: drafting gives {different} different states to fit and judge clusters by, expected"
            f" {MIN_STATES} or more; give longer prompts, four states come of each token"
        )
    states = states[np.linspace(0, len(states) - 1, min(len(states), MAX_STATES)).astype(np.int64)]
    half = len(states) // 2
    rows = checkpoint.load(DRAFTER_EMBEDDING).numpy()
    if not np.isfinite(norms := np.einsum("ve,ve->v", rows, rows)).all():
        token = int(np.isfinite(norms).argmin())
        raise InputError(
            f"{drafter_dir}: the embedding of token {token} is too large to square; restore the checkpoint"
        )
    ordering = equal_clusters(rows, clusters, options.seed, lambda: progress("k-means", 1))
    means = np.stack([rows[tokens].mean(0) for tokens in np.array_split(ordering, clusters)])
    members = ClusterTable(means, ordering).members
    best = best_logits(states, rows, members, lambda: progress("recall", 1))
    table = ClusterTable(fit_centroids(states[:half], best[:half], means), ordering)
    curve = recall_curve(cluster_ranks(states[half:], best[half:], table.centroids), clusters)
    if theirs is not None:
        ranks = cluster_ranks(states[half:], best_logits(states[half:], rows, theirs.members), theirs.centroids)
    return Clustering(
        table=table,
        top_k=int(np.searchsorted(curve, options.recall)) + 1 if options.top_k is None else options.top_k,
        recall=curve,
        num_states=len(states) - half,
        states=source,
        checkpoint_recall=None if theirs is None else recall_curve(ranks, len(theirs.centroids)),
    )


def _check_prompts(prompts: Sequence[Sequence[int]], pair: Pair) -> None:
    """Refuse prompts that the target cannot read."""
    most, vocab_size = pair.target.max_position_embeddings, pair.target.vocab_size
    for number, prompt in enumerate(prompts):
        if len(prompt) > most:
            raise InputError(f"prompt {number} has {len(prompt)} tokens, the target knows {most} positions; shorten it")
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise InputError(f"prompt {number} has token {wrong[0]}, expected ids from 0 to {vocab_size - 1}")
