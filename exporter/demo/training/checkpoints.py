"""Save and load pairs during training, with the tensor names of the published checkpoints."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING
from clustering.kmeans import equal_clusters
from exporter.checkpoint.config_json import read_drafter_config, read_target_config
from exporter.checkpoint.names import TARGET_PREFIXES, drafter_names, drafter_weights, target_weights
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.tensors import Checkpoint
from exporter.demo.held_out import measure_acceptance
from exporter.demo.training.learning import dense_head, initialise, train_centroids
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.target import OWN_HEAD, Target


def round_to_bfloat16(model: nn.Module) -> None:
    """Round every parameter of a model to bfloat16 in place; the dtype stays float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def load_target(directory: Path, ops: Ops) -> Target:
    """Load a saved target in float32.

    Args:
        directory: a target's checkpoint.
        ops: operations that the target will run with, such as linear layers in bfloat16.
    """
    config = read_target_config(directory)
    readers = target_weights(Checkpoint(directory), config)
    target = Target(config, ops, own_head=OWN_HEAD in readers)
    target.load_state_dict({name: read() for name, read in readers.items()})
    return target


def save_target(target: Target, directory: Path) -> None:
    """Write a target's weights to `directory/model.safetensors`, in bfloat16."""
    _save(directory, {TARGET_PREFIXES[0] + name: parameter for name, parameter in target.named_parameters()})


def new_drafter(directory: Path, target: Target, ops: Ops) -> Drafter:
    """Make an untrained drafter with a dense head, which shares the target's embedding.

    Args:
        directory: holds the drafter's config.json.
        target: the target that it will draft for. Gradients of its embedding are switched off.
        ops: operations that the drafter will run with.
    """
    drafter = Drafter(read_drafter_config(directory), None, ops)
    drafter.target_embed_tokens.weight = target.embed_tokens.weight
    initialise(drafter, keep=drafter.target_embed_tokens.weight.requires_grad_(False))
    return drafter


def load_drafter(drafter: Drafter, directory: Path) -> None:
    """Replace the weights of a drafter with a dense head by those of a checkpoint, whose clusters are ignored."""
    embedding = drafter.target_embed_tokens.weight
    readers = drafter_weights(Checkpoint(directory), drafter.config, None, {"embed_tokens.weight": lambda: embedding})
    drafter.load_state_dict({name: read() for name, read in readers.items()})


def save_drafter(drafter: Drafter, target: Target, tokens: Tensor, directory: Path) -> None:
    """Make clusters for a trained drafter, and write both in bfloat16.

    Args:
        drafter: a drafter with a dense head, which is rounded to bfloat16 in place.
        target: the target that it drafts for.
        tokens: [T] int64, training text, on which the centroids of the clusters are trained.
        directory: an existing directory, which gets `model.safetensors`.
    """
    head, clusters = dense_head(drafter), drafter.config.num_centroids
    round_to_bfloat16(head)
    ordering = torch.from_numpy(equal_clusters(head.weight.detach().numpy(), clusters)).reshape(clusters, -1)
    centroids = train_centroids(drafter, target, tokens, ordering)
    parameters = dict(drafter.named_parameters())
    names = drafter_names({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    stored = {name: parameters[parameter] for parameter, name in names.items()}
    _save(directory, stored | {CENTROIDS: centroids, TOKEN_ORDERING: ordering.flatten()})


def print_acceptance(directory: Path, texts: list[str]) -> None:
    """Print the acceptance rate of a saved pair that continues the beginnings of texts.

    Args:
        directory: holds `target` and `drafter`.
        texts: texts that the pair was not trained on.
    """
    measured = measure_acceptance(open_pair(directory / "target", directory / "drafter"), texts, new_tokens=96)
    print(f"accepted {measured['acceptance_rate']:.1%} of drafts in {measured['verify_passes']} passes")


def _save(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = {k: t.detach().to(torch.bfloat16 if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in stored.items()}, directory / "model.safetensors", {"format": "pt"})
