"""A target and its drafter, opened and checked against each other."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from clustering.cluster_table import ClusterTable, TwoStageSizes
from exporter.checkpoint import (
    Checkpoint,
    Weights,
    drafter_weights,
    load_module,
    parameter_shapes,
    read_cluster_table,
    target_weights,
)
from exporter.config import DrafterConfig, TextConfig, check_pair, read_drafter_config, read_target_config
from exporter.generation import SpecialTokens, default_sampling, special_tokens
from exporter.graphs import shared_kv
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target
from runtime_ref.errors import InputError
from runtime_ref.sampling import Sampling


@dataclass(frozen=True)
class Pair:
    """Configs and weight readers of a pair, and the clusters of its two-stage head, if it has not a dense one."""

    target: TextConfig
    drafter: DrafterConfig
    target_weights: Weights
    drafter_weights: Weights
    tokens: SpecialTokens
    sampling: Sampling
    target_checkpoint: Checkpoint
    drafter_checkpoint: Checkpoint
    table: ClusterTable | None = None
    two_stage: TwoStageSizes | None = None
    clusters_origin: str = ""

    @property
    def shared_kv(self) -> dict[str, int]:
        return shared_kv(self.target, self.drafter)

    @property
    def weight_bytes(self) -> int:
        """Size of what an export stores, as float32, for a progress bar."""
        target = parameter_shapes(lambda: Target(self.target))
        drafter = parameter_shapes(lambda: Drafter(self.drafter, None))
        del drafter["target_embed_tokens.weight"]  # stored with the target
        return sum(4 * prod(shape) for shape in (*target.values(), *drafter.values()))

    def load_target(self) -> Target:
        """The target in eager torch, float32."""
        return load_module(lambda: Target(self.target), self.target_weights)

    def load_drafter(self) -> Drafter:
        """The drafter in eager torch, float32."""
        return load_module(lambda: Drafter(self.drafter, self.two_stage), self.drafter_weights)

    @property
    def dense(self) -> "Pair":
        """The same pair with a dense head."""
        weights = drafter_weights(self.drafter_checkpoint, self.drafter, None, self.target_weights)
        return replace(self, table=None, two_stage=None, clusters_origin="", drafter_weights=weights)

    def with_clusters(self, table: ClusterTable, top_k: int, origin: str) -> "Pair":
        """The same pair with a two-stage head of these clusters, of which the best `top_k` are kept.

        Raises:
            InputError: more clusters are to be kept than there are.
        """
        weights = drafter_weights(self.drafter_checkpoint, self.drafter, table, self.target_weights)
        return replace(self, table=table, two_stage=table.sizes(top_k), clusters_origin=origin, drafter_weights=weights)


def open_pair(target_dir: Path, drafter_dir: Path, head: str = "auto", top_k: int | None = None) -> Pair:
    """Open both checkpoints; nothing but names, shapes and the cluster table is read yet.

    Args:
        head: `auto` takes the drafter's clusters if it has any, `checkpoint` demands them, `dense` ignores them.
        top_k: how many of those clusters to keep; None for as many as config.json says.

    Raises:
        InputError: either checkpoint is unusable, or the drafter was made for another target.
    """
    target, drafter = read_target_config(target_dir), read_drafter_config(drafter_dir)
    check_pair(target, drafter, drafter_dir)
    target_checkpoint, drafter_checkpoint = Checkpoint(target_dir), Checkpoint(drafter_dir)
    table = read_cluster_table(drafter_checkpoint, drafter)
    if head == "checkpoint" and table is None:
        raise InputError(f"{drafter_dir}: has no clusters (masked_embedding.*), but --head checkpoint asks for them")
    weights = target_weights(target_checkpoint, target)
    pair = Pair(
        target=target,
        drafter=drafter,
        target_weights=weights,
        drafter_weights=drafter_weights(drafter_checkpoint, drafter, None, weights),
        tokens=special_tokens(target_dir),
        sampling=default_sampling(target_dir),
        target_checkpoint=target_checkpoint,
        drafter_checkpoint=drafter_checkpoint,
    )
    if head != "dense" and table is not None:
        return pair.with_clusters(table, drafter.centroid_intermediate_top_k if top_k is None else top_k, "checkpoint")
    if top_k is not None:
        raise InputError(f"--top-k-clusters is {top_k}, but the head is dense; pass --head kmeans to make clusters")
    return pair
