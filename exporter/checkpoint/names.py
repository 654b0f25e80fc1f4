"""Tables of tensor names: which tensor of a checkpoint is which parameter of the model, in each dialect."""

import fnmatch
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING, ClusterTable
from exporter.checkpoint.config_json import is_tied
from exporter.checkpoint.other_forms import refuse_other_tensors
from exporter.checkpoint.packed import Packed, activation_scales, check_settings, find_packed, packed_reader
from exporter.checkpoint.tensors import FLOAT_DTYPES, BlockReader, Checkpoint, IntegerReader, TensorEntry, TensorReader
from exporter.modeling.config import DrafterConfig, TextConfig
from exporter.modeling.drafter import drafter_shapes
from exporter.modeling.target import OWN_HEAD, target_shapes
from exporter.modeling.weights import Weights
from runtime_ref.errors import InputError

# Prefixes of the target's text decoder in a checkpoint, by dialect; the first with a first layer applies.
TARGET_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")

# Target tensors that are not exported: patterns of names in the checkpoint, and the reason.
IGNORED_TARGET = {
    "*vision_tower.*": "vision",
    "*audio_tower.*": "audio",
    "*embed_vision.*": "vision",
    "*embed_audio.*": "audio",
    "*rotary_emb.*inv_freq": "computed from config.json",
    "*lm_head.weight": "equal to the embedding, which is checked, or read apart",
}

# The target's tables, as parameters of `Target`.
EMBEDDING = "embed_tokens.weight"
PER_LAYER = "embed_tokens_per_layer.weight"
HEAD = "lm_head.weight"
FIRST_NORM = "layers.0.input_layernorm.weight"
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

Reader = TensorReader | IntegerReader


def target_weights(checkpoint: Checkpoint, config: TextConfig, keeps_head: bool = False) -> Weights:
    """Return a reader for each parameter of `Target`; other tensors of the checkpoint are ignored by a rule or refused.

    Args:
        checkpoint: the target's tensors.
        config: the target's config.
        keeps_head: whether a head that config.json does not tie to the embedding is kept apart even if it is equal;
            `merge_equal_head` decides later.

    Returns:
        Readers by name, with that of `OWN_HEAD` if the checkpoint has a head that is not its embedding.

    Raises:
        InputError: a tensor is missing, unknown, of the wrong shape, or quantized in a way that is not supported.
    """
    packed, of_packed = find_packed(checkpoint)
    check_settings(checkpoint.directory)
    names = packed.keys() | (checkpoint.entries.keys() - of_packed)
    refuse_other_tensors(checkpoint.directory, names)
    prefix = _prefix(names)
    shapes = target_shapes(config)
    ignored = shared_layer_tensors(prefix, range(config.num_kv_layers, config.num_hidden_layers))
    ignored |= {name for name in names for pattern in IGNORED_TARGET if fnmatch.fnmatchcase(name, pattern)}
    names_in_file = {name: prefix + name for name in shapes}
    heads = [name for name in sorted(names) if name.endswith(HEAD)]
    if names_in_file[EMBEDDING] not in names and heads and is_tied(checkpoint.directory):
        names_in_file[EMBEDDING] = heads[0]  # one matrix, of whose two names a tool has kept this one
    _refuse_unknown(checkpoint, names, set(names_in_file.values()) | ignored)
    groups = {PER_LAYER: config.num_hidden_layers}
    readers = _select(checkpoint, names_in_file, shapes, packed, groups)
    stored = _select(checkpoint, dict(zip(heads, heads, strict=True)), dict.fromkeys(heads, shapes[EMBEDDING]), packed)
    own = _own_head(checkpoint, stored, readers[EMBEDDING])
    if own is None and keeps_head and not is_tied(checkpoint.directory):
        own = stored[heads[0]]
    return readers if own is None else {**readers, OWN_HEAD: own}


def merge_equal_head(weights: Weights) -> Weights:
    """Return the same readers without that of a head that is equal to the embedding."""
    head, embedding = weights.get(OWN_HEAD), weights[EMBEDDING]
    if isinstance(head, BlockReader) and isinstance(embedding, BlockReader) and same_blocks(head, embedding):
        return {name: read for name, read in weights.items() if name != OWN_HEAD}
    return weights


def target_activation_scales(checkpoint: Checkpoint, weights: Weights) -> dict[str, Tensor]:
    """Return what `exporter.checkpoint.packed.activation_scales` reads of a target's checkpoint.

    Args:
        checkpoint: the target's tensors.
        weights: what `target_weights` returned.
    """
    packed, _ = find_packed(checkpoint)
    prefix = _prefix(packed.keys() | checkpoint.entries.keys())
    modules = [name.removesuffix(".weight") for name in weights if prefix + name in packed]
    owners = {prefix + module: module for module in modules}
    head = "lm_head" if OWN_HEAD in weights else "embed_tokens"
    owners |= {name.removesuffix(".weight"): head for name in packed if name.endswith(HEAD)}
    return activation_scales(checkpoint, owners)


def _prefix(names: Collection[str]) -> str:
    return next((p for p in TARGET_PREFIXES if p + FIRST_NORM in names), TARGET_PREFIXES[0])


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
    shapes = drafter_shapes(config)
    names_in_file = drafter_names(shapes)
    names_in_file["head.weight"] = drafter_embedding(checkpoint)
    ignored = shared_layer_tensors("model.", range(config.text.num_hidden_layers))
    known = {*names_in_file.values(), CENTROIDS, TOKEN_ORDERING, HEAD} | ignored
    _refuse_unknown(checkpoint, checkpoint.entries.keys(), known)
    readers = _select(checkpoint, names_in_file, shapes)
    heads = {name: name for name in checkpoint.entries if name.endswith(HEAD)}
    stored = _select(checkpoint, heads, dict.fromkeys(heads, shapes["head.weight"]))
    if _own_head(checkpoint, stored, readers["head.weight"]) is not None:
        name = min(heads)
        raise InputError(
            f"{checkpoint.entries[name].file}: tensor {name} differs from {DRAFTER_EMBEDDING}, and a drafter's head of"
            " its own cannot be exported; tie it to the embedding, or pass a checkpoint in which it is tied"
        )
    weights: dict[str, Callable[[], Tensor]] = dict(readers)
    weights["target_embed_tokens.weight"] = target[EMBEDDING]
    if table is not None:
        embedding, members = weights.pop("head.weight"), torch.from_numpy(table.members)
        weights["head.centroids"] = lambda: torch.from_numpy(table.centroids)
        weights["head.clusters"] = lambda: embedding()[members.flatten()].reshape(len(members), -1)
        weights["head.token_ids"] = members.float
    return weights


def drafter_embedding(checkpoint: Checkpoint) -> str:
    """Return the name of a drafter's embedding in its checkpoint, which may have it as its head alone."""
    return HEAD if DRAFTER_EMBEDDING not in checkpoint.entries and HEAD in checkpoint.entries else DRAFTER_EMBEDDING


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
    packed: Mapping[str, Packed] = {},
    groups: Mapping[str, int] = {},
) -> dict[str, Reader]:
    """Readers by parameter name, for the names in the checkpoint; raise where a tensor is missing or does not fit.

    `groups` are the scales that a row of a packed matrix is read with at least, if not one.
    """
    readers: dict[str, Reader] = {}
    for name, stored in names.items():
        if stored in packed:
            readers[name] = packed_reader(checkpoint, packed[stored], shapes[name], groups.get(name, 1))
            continue
        entry = checkpoint.entries.get(stored)
        if entry is None:
            raise InputError(f"{checkpoint.directory}: tensor {stored} is missing; restore the checkpoint")
        _check_entry(entry, stored, shapes[name], FLOAT_DTYPES)
        readers[name] = TensorReader(checkpoint, stored)
    return readers


def _own_head(checkpoint: Checkpoint, stored: Mapping[str, Reader], embedding: Reader) -> Reader | None:
    """Return the reader of a head that is stored beside the embedding and differs from it; None if there is none.

    Raises:
        InputError: config.json says the opposite of what is stored.
    """
    tied = is_tied(checkpoint.directory)
    if not stored and not tied:
        raise InputError(
            f"{checkpoint.directory}: tie_word_embeddings is false, but tensor {HEAD} is missing; restore it, or"
            " correct config.json"
        )
    for name, head in stored.items():
        if not same_blocks(head, embedding):
            if not tied:
                return head
            raise InputError(
                f"{checkpoint.directory}: tensor {name} differs from the embedding, but tie_word_embeddings is true;"
                " correct config.json, or restore the checkpoint"
            )
    return None


def same_blocks(one: BlockReader, other: BlockReader) -> bool:
    """Return whether two readers give the same matrix, without holding either as a whole."""
    # Their dtypes may differ, and with them what a block of the same size holds.
    blocks = (reader.blocks(HEAD_BLOCK_ROWS) for reader in (one, other))
    return all(torch.equal(*pair) for pair in zip(*blocks, strict=True))


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


def _refuse_unknown(checkpoint: Checkpoint, names: Collection[str], known: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        entry = checkpoint.entries.get(unknown[0])
        place = checkpoint.directory if entry is None else entry.file
        raise InputError(
            f"{place}: unknown tensor {unknown[0]}{more}, which no rule maps or ignores;"
            " pass an unmodified Gemma 4 checkpoint"
        )


def shared_layer_tensors(prefix: str, layers: range) -> set[str]:
    """Return the names of tensors of KV-shared layers that nothing reads, after a prefix."""
    return {f"{prefix}layers.{i}.self_attn.{name}" for i in layers for name in IGNORED_ON_SHARED_LAYERS}
