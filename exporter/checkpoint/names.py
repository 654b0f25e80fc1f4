"""Tables of tensor names: which tensor of a checkpoint is which parameter of the model, in each dialect."""

import fnmatch
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING, ClusterTable
from exporter.checkpoint.config_json import is_tied
from exporter.checkpoint.other_forms import refuse_other_tensors
from exporter.checkpoint.tensors import FLOAT_DTYPES, Checkpoint, TensorEntry, TensorReader
from exporter.modeling.config import DrafterConfig, TextConfig
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target
from exporter.modeling.weights import Weights, parameter_shapes
from runtime_ref.errors import InputError

# Prefixes of the target's text decoder in a checkpoint, by dialect; the first with an embedding applies.
TARGET_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")

# Target tensors that are not exported: patterns of names in the checkpoint, and the reason.
IGNORED_TARGET = {
    "*vision_tower.*": "vision",
    "*audio_tower.*": "audio",
    "*embed_vision.*": "vision",
    "*embed_audio.*": "audio",
    "*rotary_emb.*inv_freq": "computed from config.json",
    "*lm_head.weight": "equal to the embedding, which is checked",
}

HEAD = "lm_head.weight"
HEAD_BLOCK_ROWS = 4096  # that are compared at a time

# Tensors that a checkpoint may hold for KV-shared layers, and that nothing reads.
IGNORED_ON_SHARED_LAYERS = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight")

# Drafter tensors: name in the module, and name in the checkpoint; `{}` is the rest of the name.
DRAFTER_NAMES = {
    "layers.{}": "model.layers.{}",
    "norm.weight": "model.norm.weight",
    "pre_projection.weight": "pre_projection.weight",
    "post_projection.weight": "post_projection.weight",
}

DRAFTER_EMBEDDING = "model.embed_tokens.weight"


def target_weights(checkpoint: Checkpoint, config: TextConfig, mapped: bool = False) -> Weights:
    """Return a reader for each parameter of `Target`; other tensors of the checkpoint are ignored by a rule or refused.

    Args:
        checkpoint: the target's tensors.
        config: the target's config.
        mapped: whether readers map tensors with the dtype they are stored in (`Checkpoint.map`); otherwise they read
            them as float32.

    Raises:
        InputError: a tensor is missing, unknown, of the wrong shape or quantized.
    """
    names = checkpoint.entries.keys()
    refuse_other_tensors(checkpoint.directory, names)
    prefix = next((p for p in TARGET_PREFIXES if f"{p}embed_tokens.weight" in names), TARGET_PREFIXES[0])
    shapes = parameter_shapes(lambda: Target(config))
    ignored = _shared_layer_tensors(prefix, range(config.num_kv_layers, config.num_hidden_layers))
    ignored |= {name for name in names for pattern in IGNORED_TARGET if fnmatch.fnmatchcase(name, pattern)}
    names_in_file = {name: prefix + name for name in shapes}
    _refuse_unknown(checkpoint, set(names_in_file.values()) | ignored)
    readers = _select(checkpoint, names_in_file, shapes)
    if not mapped:  # which other readers were made before; it reads the whole head
        _check_head(checkpoint, readers["embed_tokens.weight"])
    return {n: functools.partial(checkpoint.map, r.name) for n, r in readers.items()} if mapped else readers


def drafter_weights(
    checkpoint: Checkpoint, config: DrafterConfig, table: ClusterTable | None, target: Weights
) -> Weights:
    """Return a reader for each parameter of `Drafter`.

    Args:
        checkpoint: the drafter's tensors.
        config: the drafter's config.
        table: the clusters of a two-stage head; None for a dense head.
        target: the target's readers, for the embedding table that the drafter reads as well.

    Raises:
        InputError: a tensor is missing, unknown, of the wrong shape or quantized.
    """
    refuse_other_tensors(checkpoint.directory, checkpoint.entries)
    shapes = parameter_shapes(lambda: Drafter(config, None))
    names_in_file = drafter_names(shapes)
    ignored = _shared_layer_tensors("model.", range(config.text.num_hidden_layers))
    _refuse_unknown(checkpoint, {*names_in_file.values(), CENTROIDS, TOKEN_ORDERING, HEAD} | ignored)
    readers = _select(checkpoint, names_in_file, shapes)
    _check_head(checkpoint, readers["head.weight"])
    weights: dict[str, Callable[[], Tensor]] = dict(readers)
    weights["target_embed_tokens.weight"] = target["embed_tokens.weight"]
    if table is not None:
        embedding, members = weights.pop("head.weight"), torch.from_numpy(table.members)
        weights["head.centroids"] = lambda: torch.from_numpy(table.centroids)
        weights["head.clusters"] = lambda: embedding()[members.flatten()].reshape(len(members), -1)
        weights["head.token_ids"] = members.float
    return weights


def drafter_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the name in the checkpoint of each parameter of a drafter with a dense head, by name in the module.

    `target_embed_tokens.weight` is left out, because the target's checkpoint holds it.

    Args:
        shapes: shape of each parameter of the drafter, by name.
    """
    names = {"head.weight": DRAFTER_EMBEDDING}
    for module_name, stored in DRAFTER_NAMES.items():
        stem = module_name.removesuffix("{}")
        names |= {name: stored.replace("{}", name.removeprefix(stem)) for name in shapes if name.startswith(stem)}
    return names


def read_cluster_table(checkpoint: Checkpoint, config: DrafterConfig) -> ClusterTable | None:
    """Read the clusters of a drafter's checkpoint; None if it holds none, whatever the config says.

    Args:
        checkpoint: the drafter's tensors.
        config: the drafter's config.

    Raises:
        InputError: one of the two tensors is missing, the clusters do not fit the config, centroids hold NaN or
            infinity, or the token ordering is not a permutation.
    """
    entries = checkpoint.entries
    if CENTROIDS not in entries and TOKEN_ORDERING not in entries:
        return None
    expected = {
        CENTROIDS: (config.num_centroids, config.text.hidden_size),
        TOKEN_ORDERING: (config.text.vocab_size,),
    }
    for name, dtypes in ((CENTROIDS, FLOAT_DTYPES), (TOKEN_ORDERING, ("I64", "I32"))):
        if name not in entries:
            raise InputError(
                f"{checkpoint.directory}: tensor {name} is missing, expected both of {CENTROIDS} and {TOKEN_ORDERING}"
                " or neither; restore the checkpoint"
            )
        _check_entry(entries[name], name, expected[name], dtypes)
    table = ClusterTable(checkpoint.load(CENTROIDS).numpy(), checkpoint.load(TOKEN_ORDERING).long().numpy())
    source = str(entries[TOKEN_ORDERING].file)
    table.check(source)
    if config.text.vocab_size % config.num_centroids:
        raise InputError(
            f"{source}: {config.text.vocab_size} tokens do not split into {config.num_centroids} clusters of equal"
            " size; correct num_centroids in config.json"
        )
    if config.centroid_intermediate_top_k > config.num_centroids:
        raise InputError(
            f"{checkpoint.directory}: centroid_intermediate_top_k is {config.centroid_intermediate_top_k}, more than"
            f" the {config.num_centroids} clusters there are; correct config.json"
        )
    return table


def _select(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorReader]:
    """Readers by parameter name, for the names in the checkpoint; raise where a tensor is missing or does not fit."""
    for name, stored in names.items():
        entry = checkpoint.entries.get(stored)
        if entry is None:
            raise InputError(f"{checkpoint.directory}: tensor {stored} is missing; restore the checkpoint")
        _check_entry(entry, stored, shapes[name], FLOAT_DTYPES)
    return {name: TensorReader(checkpoint, stored) for name, stored in names.items()}


def _check_head(checkpoint: Checkpoint, embedding: TensorReader) -> None:
    """Check that a head that is stored beside the embedding equals it: graphs compute logits with the embedding.

    Raises:
        InputError: it does not, or there is none although config.json says that it is not the embedding.
    """
    stored, tied = [name for name in checkpoint.entries if name.endswith(HEAD)], is_tied(checkpoint.directory)
    if not stored and not tied:
        raise InputError(
            f"{checkpoint.directory}: tie_word_embeddings is false, but tensor {HEAD} is missing; restore it, or"
            " correct config.json"
        )
    for name in stored:
        _check_entry(checkpoint.entries[name], name, checkpoint.entries[embedding.name].shape, FLOAT_DTYPES)
        # Their dtypes may differ, and with them what a block of the same size holds.
        head, weight = (checkpoint.blocks(tensor, HEAD_BLOCK_ROWS) for tensor in (name, embedding.name))
        if not all(torch.equal(*blocks) for blocks in zip(head, weight, strict=True)):
            raise InputError(
                f"{checkpoint.entries[name].file}: tensor {name} differs from {embedding.name}, and a head of its own"
                " cannot be exported yet; tie it to the embedding, or pass a checkpoint in which it is tied"
            )


def _check_entry(entry: TensorEntry, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if entry.shape != shape:
        raise InputError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)};"
            " pass weights and a config.json of the same model"
        )
    if entry.dtype not in dtypes:
        raise InputError(
            f"{entry.file}: tensor {name} is {entry.dtype}, expected one of {', '.join(dtypes)}; pass an unquantized"
            " checkpoint"
        )


def _refuse_unknown(checkpoint: Checkpoint, known: set[str]) -> None:
    if unknown := sorted(checkpoint.entries.keys() - known):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"{checkpoint.entries[unknown[0]].file}: unknown tensor {unknown[0]}{more}, which no rule maps or ignores;"
            " pass an unmodified Gemma 4 checkpoint"
        )


def _shared_layer_tensors(prefix: str, layers: range) -> set[str]:
    return {f"{prefix}layers.{i}.self_attn.{name}" for i in layers for name in IGNORED_ON_SHARED_LAYERS}
