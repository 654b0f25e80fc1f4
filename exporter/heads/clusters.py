"""Make the clusters of a drafter's two-stage head, and measure how often its first stage keeps the best token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clustering.cluster_table import ClusterTable, TwoStageSizes, work_ratios
from clustering.kmeans import BALANCING_ITERATIONS, default_clusters, equal_clusters
from clustering.recall import DEFAULT_RECALL, best_logits, cluster_ranks, fit_centroids, recall_curve
from exporter.checkpoint.config_json import read_drafter_config
from exporter.checkpoint.names import drafter_embedding, read_cluster_table
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import Checkpoint
from exporter.heads.states import drafting_states, prompt_passes, states_without_target
from exporter.modeling.config import DrafterConfig
from exporter.parity.drafting import DRAFT_STEPS
from exporter.texts.token_texts import TokenTexts, fitting_texts
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

MIN_STATES = 1024  # half of them measure recall: with fewer, one percent of it would be chance
MAX_STATES = 16384  # more are thinned out evenly


@dataclass(frozen=True)
class ClusterOptions:
    """How a vocabulary is clustered.

    Attributes:
        num_clusters: how many clusters to make; None for the default of the vocabulary's size.
        top_k: how many of them the first stage keeps; None for as few as reach `recall`.
        recall: fraction of states whose best token must be in a kept cluster; ignored if `top_k` is given.
        seed: of the k-means.
    """

    num_clusters: int | None = None
    top_k: int | None = None
    recall: float = DEFAULT_RECALL
    seed: int = 0


@dataclass(frozen=True)
class Clustering:
    """Clusters of a vocabulary, and their recall on states that nothing was fitted on.

    Attributes:
        table: the clusters.
        top_k: how many of them the first stage keeps.
        recall: [C] float64, fraction of states whose best token is kept when 1, 2, .. C clusters are kept.
        num_states: how many states recall was measured on.
        states: where the states come from, for people.
        checkpoint_recall: the same as `recall`, on the same states, for the clusters in the drafter's checkpoint; None
            if it has none.
    """

    table: ClusterTable
    top_k: int
    recall: np.ndarray
    num_states: int
    states: str
    checkpoint_recall: np.ndarray | None

    @property
    def work_ratio(self) -> float:
        """Multiplications of both stages over those of a dense head."""
        return float(work_ratios(len(self.table.token_ordering), len(self.recall))[self.top_k - 1])

    def measurements(self) -> dict[str, Any]:
        """Return sizes and recall as the JSON of `cluster` and `report` has them."""
        sizes, tokens = self.table.sizes(self.top_k), len(self.table.token_ordering)
        reference, ratios = self.checkpoint_recall, work_ratios(tokens, len(self.recall))
        curve = []
        for k in sorted({2**i for i in range(len(self.recall).bit_length())} | {self.top_k, len(self.recall)}):
            scored = min(k * sizes.cluster_size, tokens)
            row = {"top_k_clusters": k, "tokens_scored": scored, "recall": float(self.recall[k - 1])}
            row["share_of_dense_head"] = float(ratios[k - 1])
            if reference is not None:
                # Of clusters with as many tokens together; None if one of the checkpoint's clusters is larger.
                reference_k = scored * len(reference) // tokens
                row["checkpoint_recall"] = float(reference[reference_k - 1]) if reference_k else None
            curve.append(row)
        return {
            "num_clusters": sizes.num_clusters,
            "cluster_size": sizes.cluster_size,
            "top_k_clusters": self.top_k,
            "recall": float(self.recall[self.top_k - 1]),
            "checkpoint_clusters": None if reference is None else len(reference),
            "num_states": self.num_states,
            "states": self.states,
            "curve": curve,
        }


def num_clusters(config: DrafterConfig, options: ClusterOptions) -> int:
    """Return how many clusters the options ask for.

    Args:
        config: the drafter's.
        options: as for `make_clusters`.

    Raises:
        InputError: there are more clusters than tokens, or more to keep than there are.
    """
    vocab_size = config.text.vocab_size
    clusters = default_clusters(vocab_size) if options.num_clusters is None else options.num_clusters
    TwoStageSizes.of(vocab_size, clusters, 1 if options.top_k is None else options.top_k)
    return clusters


def cluster_steps(texts: TokenTexts | None) -> int:
    """Return how many steps `make_clusters` reports at most, for the same texts; None without a target."""
    passes = 0 if texts is None else prompt_passes(texts.texts)
    return passes + 1 + BALANCING_ITERATIONS + 16


def make_clusters(
    drafter_dir: Path,
    pair: Pair | None,
    options: ClusterOptions = ClusterOptions(),
    texts: TokenTexts | None = None,
    progress: Progress = lambda *_: None,
) -> Clustering:
    """Cluster a drafter's output embedding by k-means, and fit centroids that find the best token's cluster.

    Centroids are fitted on one half of the drafter's states, those of every other text as far as texts are equally
    long; recall is measured on the other half.

    Args:
        drafter_dir: the drafter's checkpoint.
        pair: the same drafter with its target, for states of real drafting; without it the drafter runs on random
            input.
        options: how many clusters to make and to keep.
        texts: token ids that the pair drafts on; None for those of `fitting_texts`.
        progress: called with a description and the number 1 after each of `cluster_steps` steps.

    Raises:
        InputError: an unusable checkpoint, a prompt the target cannot run, too few different states, states or rows
            that are not finite, more clusters than tokens, or more clusters to keep than there are.
    """
    config, checkpoint = read_drafter_config(drafter_dir), Checkpoint(drafter_dir)
    clusters = num_clusters(config, options)
    reference = read_cluster_table(checkpoint, config)
    if pair is None:
        states, source = states_without_target(checkpoint, config).numpy(), "the drafter alone on random input"
    else:
        texts = fitting_texts(pair) if texts is None else texts
        _check_prompts(texts.texts, pair)
        source = f"drafting on {texts.source}"
        in_halves = [*texts.texts[::2], *texts.texts[1::2]]  # texts in order would have one language to fit on
        states = drafting_states(pair.dense, in_halves, lambda: progress("drafting", 1)).numpy()
    if not np.isfinite(states).all():
        raise InputError(f"{drafter_dir}: drafting gives states of NaN or infinity; restore target and drafter")
    if (different := len(np.unique(states, axis=0))) < MIN_STATES:
        raise InputError(
            f"{drafter_dir}: drafting gives {different} different states to fit and test clusters on, expected"
            f" {MIN_STATES} or more; give longer prompts, each token gives {DRAFT_STEPS} states"
        )
    states = states[np.linspace(0, len(states) - 1, min(len(states), MAX_STATES)).astype(np.int64)]
    half = len(states) // 2
    rows = checkpoint.load(drafter_embedding(checkpoint)).numpy()
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
    if reference is not None:
        reference_best = best_logits(states[half:], rows, reference.members)
        ranks = cluster_ranks(states[half:], reference_best, reference.centroids)
    return Clustering(
        table=table,
        top_k=int(np.searchsorted(curve, options.recall)) + 1 if options.top_k is None else options.top_k,
        recall=curve,
        num_states=len(states) - half,
        states=source,
        checkpoint_recall=None if reference is None else recall_curve(ranks, len(reference.centroids)),
    )


def _check_prompts(prompts: Sequence[Sequence[int]], pair: Pair) -> None:
    """Refuse prompts that the target cannot run."""
    max_tokens, vocab_size = pair.target.max_position_embeddings, pair.target.vocab_size
    for number, prompt in enumerate(prompts):
        if len(prompt) > max_tokens:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, the target has {max_tokens} positions; shorten it"
            )
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise InputError(
                f"prompt {number} has token {wrong[0]}, expected ids from 0 to {vocab_size - 1}; make the prompt with"
                " the target's tokenizer"
            )
