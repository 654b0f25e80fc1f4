"""Open a target and its drafter, and check that they belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clustering.cluster_table import ClusterTable, TwoStageSizes
from exporter.checkpoint.adapters import adapter_notes, merged_weights, open_adapter
from exporter.checkpoint.config_json import (
    check_pair,
    config_notes,
    read_drafter_config,
    read_target_config,
    vocabulary_notes,
)
from exporter.checkpoint.folding import folded_weights
from exporter.checkpoint.generation_config import default_repetition_penalty, default_sampling, generation_warnings
from exporter.checkpoint.names import (
    EMBEDDING,
    drafter_weights,
    merge_equal_head,
    read_cluster_table,
    shared_layer_tensors,
    target_activation_scales,
    target_weights,
)
from exporter.checkpoint.other_forms import ADAPTER_CONFIG
from exporter.checkpoint.special_tokens import SpecialTokens, special_tokens, suppression
from exporter.checkpoint.tensors import Checkpoint, TensorReader
from exporter.modeling.config import DrafterConfig, TextConfig, shared_kv
from exporter.modeling.drafter import Drafter, drafter_shapes
from exporter.modeling.layers import Ops
from exporter.modeling.target import OWN_HEAD, Target, target_shapes
from exporter.modeling.weights import Weights, constant, load_module, parameter_shapes
from runtime_ref.errors import InputError
from runtime_ref.manifest import file_sha256
from runtime_ref.sampling import Sampling


@dataclass(frozen=True)
class Calibrated:
    """How a target's matrices were rounded by their effect on texts, as the manifest's `calibration` says it.

    Attributes:
        texts: what the texts were, for people.
        sha256: digest of their token ids.
        tokens: number of their tokens.
        threads: threads of torch; with another number, the last bits of sums may differ, and with them the integers.
        matrices: names of the matrices.
    """

    texts: str
    sha256: str
    tokens: int
    threads: int
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A target and its drafter: configs, readers of their weights, and the drafter's head.

    Attributes:
        target: config of the target.
        drafter: config of the drafter.
        checkpoint_weights: a reader for each parameter of `Target` as the checkpoint has it, by name.
        target_weights: the same with what was folded and calibrated since.
        drafter_weights: a reader for each parameter of `Drafter` with this pair's head, by name.
        tokens: special tokens.
        sampling: the checkpoint's sampling defaults.
        repetition_penalty: the checkpoint's, 1 for none.
        warnings: what the target's checkpoint asks for and a bundle does not do, in a line each.
        target_checkpoint: tensors of the target's checkpoint.
        drafter_checkpoint: tensors of the drafter's checkpoint.
        adapters: tensors of the adapters that are merged into the target, in this order.
        table: clusters of the two-stage head; None for a dense head.
        two_stage: sizes of the two-stage head; None for a dense head.
        clusters_origin: where the clusters come from, "checkpoint" or "kmeans"; empty for a dense head.
        calibrated: how matrices of the target were rounded, whose readers are `IntegerReader`; None if none were.
        activation_scales: scales of the grids of 8 bits that the target was trained to round inputs and outputs of
            matrices to, by the names of their parameters; `with_activations` makes them weights.
        folding: exponents of two that are folded into `target_weights`, as `exporter.checkpoint.folding` describes.
    """

    target: TextConfig
    drafter: DrafterConfig
    checkpoint_weights: Weights
    target_weights: Weights
    drafter_weights: Weights
    tokens: SpecialTokens
    sampling: Sampling
    repetition_penalty: float
    warnings: tuple[str, ...]
    target_checkpoint: Checkpoint
    drafter_checkpoint: Checkpoint
    adapters: tuple[Checkpoint, ...] = ()
    table: ClusterTable | None = None
    two_stage: TwoStageSizes | None = None
    clusters_origin: str = ""
    calibrated: Calibrated | None = None
    activation_scales: Mapping[str, Tensor] = field(default_factory=dict)
    folding: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shared_kv(self) -> dict[str, int]:
        """Index of the target layer whose K and V the drafter's layers of each type read, by layer type."""
        return shared_kv(self.target, self.drafter)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that an export stores, if they were float32; the total of a progress bar."""
        target = parameter_shapes(self.new_target)
        drafter = dict(drafter_shapes(self.drafter))
        del drafter["target_embed_tokens.weight"]  # stored with the target
        return sum(4 * prod(shape) for shape in (*target.values(), *drafter.values()))

    def new_target(self, ops: Ops = Ops()) -> Target:
        """Make the target without its weights, with a backend's operations."""
        target = Target(self.target, ops, bool(self.tokens.suppressed), OWN_HEAD in self.checkpoint_weights)
        for name in self.activation_scales if self.rounds_activations else ():
            owner, _, leaf = name.rpartition(".")
            target.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.empty(1), requires_grad=False))
        return target

    def with_activations(self) -> "Pair":
        """Return the same pair with a target that rounds inputs and outputs of matrices as its checkpoint says."""
        scales = {name: constant(scale) for name, scale in self.activation_scales.items()}
        return replace(
            self,
            checkpoint_weights={**self.checkpoint_weights, **scales},
            target_weights={**self.target_weights, **scales},
        )

    @property
    def rounds_activations(self) -> bool:
        """Whether the target rounds inputs and outputs of matrices by `activation_scales`."""
        return bool(self.activation_scales) and self.activation_scales.keys() <= self.checkpoint_weights.keys()

    @property
    def head(self) -> str:
        """Name of the target's parameter that logits are computed with, which is its embedding in most checkpoints."""
        return OWN_HEAD if OWN_HEAD in self.checkpoint_weights else EMBEDDING

    def load_target(self) -> Target:
        """Load the target in eager torch, float32."""
        return load_module(self.new_target, self.target_weights)

    @property
    def stamps(self) -> list[Any]:
        """What changes with the files that the target's weights come from, as JSON."""
        configs = [file_sha256(adapter.directory / ADAPTER_CONFIG) for adapter in self.adapters]
        return [self.target_checkpoint.stamps, *(adapter.stamps for adapter in self.adapters), *configs]

    @property
    def mapped_target_weights(self) -> Weights:
        """Readers of the checkpoint's weights, with nothing folded or rounded, mapped in the dtype of their file.

        Those of packed integers are `IntegerReader`, as in `checkpoint_weights`, and those with what adapters add are
        `MergedReader`.
        """
        return {
            name: partial(read.checkpoint.map, read.name) if isinstance(read, TensorReader) else read
            for name, read in self.checkpoint_weights.items()
        }

    def with_folding(self, exponents: Mapping[str, Tensor]) -> "Pair":
        """Return the same pair with factors folded into its target's weights, by the site's name."""
        return replace(self, target_weights=folded_weights(self.target_weights, exponents), folding=exponents)

    def load_drafter(self) -> Drafter:
        """Load the drafter in eager torch, float32."""
        return load_module(lambda: Drafter(self.drafter, self.two_stage), self.drafter_weights)

    @property
    def dense(self) -> "Pair":
        """The same pair with a dense head."""
        weights = drafter_weights(self.drafter_checkpoint, self.drafter, None, self.target_weights)
        return replace(self, table=None, two_stage=None, clusters_origin="", drafter_weights=weights)

    def with_clusters(self, table: ClusterTable, top_k: int, origin: str) -> "Pair":
        """Return the same pair with a two-stage head of other clusters.

        Args:
            table: the clusters.
            top_k: number of clusters that the first stage keeps.
            origin: where the clusters come from, as in `clusters_origin`.

        Raises:
            InputError: `top_k` is not between 1 and the number of clusters.
        """
        weights = drafter_weights(self.drafter_checkpoint, self.drafter, table, self.target_weights)
        return replace(self, table=table, two_stage=table.sizes(top_k), clusters_origin=origin, drafter_weights=weights)


def open_pair(
    target_dir: Path,
    drafter_dir: Path,
    head: str = "auto",
    top_k: int | None = None,
    adapter_dirs: Sequence[Path] = (),
) -> Pair:
    """Open both checkpoints; of their tensors, only names, shapes, the cluster table and a head of its own are read.

    Args:
        target_dir: the target's checkpoint directory.
        drafter_dir: the drafter's checkpoint directory.
        head: "auto" takes the drafter's clusters if it has any, "checkpoint" requires them, "dense" ignores them.
        top_k: number of those clusters that the first stage keeps; None for the number in config.json.
        adapter_dirs: directories of LoRA adapters that are merged into the target, in this order.

    Raises:
        InputError: either checkpoint or an adapter is unusable, the drafter was made for another target, the drafter
            has no clusters that "checkpoint" requires, or `top_k` does not fit the head.
    """
    target, drafter = read_target_config(target_dir), read_drafter_config(drafter_dir)
    check_pair(target, drafter, drafter_dir)
    target_checkpoint, drafter_checkpoint = Checkpoint(target_dir), Checkpoint(drafter_dir)
    table = read_cluster_table(drafter_checkpoint, drafter)
    if head == "checkpoint" and table is None:
        raise InputError(
            f"{drafter_dir}: has no clusters (masked_embedding.*), but --head checkpoint asks for them; pass a drafter"
            " with clusters, or export with --head kmeans"
        )
    tokens, token_warnings = special_tokens(target_dir)
    weights = target_weights(target_checkpoint, target, keeps_head=bool(adapter_dirs))
    shapes = target_shapes(target, own_head=True)
    unread = shared_layer_tensors("", range(target.num_kv_layers, target.num_hidden_layers))
    adapters = [open_adapter(directory, shapes, unread) for directory in adapter_dirs]
    for adapter in adapters:
        weights = merged_weights(weights, adapter, target_dir)
    weights = {**merge_equal_head(weights), **suppression(tokens, target.vocab_size)}
    if len([token for token in tokens.suppressed if token < target.vocab_size]) == target.vocab_size:
        raise InputError(
            f"{target_dir}: suppress_tokens names every token; correct generation_config.json or config.json"
        )
    pair = Pair(
        target=target,
        drafter=drafter,
        checkpoint_weights=weights,
        target_weights=weights,
        drafter_weights=drafter_weights(drafter_checkpoint, drafter, None, weights),
        tokens=tokens,
        sampling=default_sampling(target_dir),
        repetition_penalty=default_repetition_penalty(target_dir),
        warnings=(
            *config_notes(target_dir),
            *config_notes(drafter_dir),
            *generation_warnings(target_dir),
            *token_warnings,
            *vocabulary_notes(target, drafter, drafter_dir),
            *(note for adapter in adapters for note in adapter_notes(adapter, target_dir)),
        ),
        target_checkpoint=target_checkpoint,
        drafter_checkpoint=drafter_checkpoint,
        adapters=tuple(adapter.checkpoint for adapter in adapters),
        activation_scales=target_activation_scales(target_checkpoint, weights),
    )
    if head != "dense" and table is not None:
        return pair.with_clusters(table, drafter.centroid_intermediate_top_k if top_k is None else top_k, "checkpoint")
    if top_k is not None:
        raise InputError(f"--top-k-clusters is {top_k}, but the head is dense; pass --head kmeans to make clusters")
    return pair
