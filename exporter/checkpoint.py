"""Read Hugging Face checkpoint directories: strict names, strict shapes, a few rows in memory at a time."""

import fnmatch
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING, ClusterTable
from exporter.config import DrafterConfig, TextConfig, read_object
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target
from runtime_ref.errors import InputError
from runtime_ref.manifest import file_sha256

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Module parameters by name, each read (and where needed converted) when it is called.
Weights = Mapping[str, Callable[[], Tensor]]

FLOAT_DTYPES = ("F32", "F16", "BF16")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
BLOCK_BYTES = 1 << 26  # read at a time: what is made of it on its way to a file takes a few times as much

# Where the target's text decoder stands in a checkpoint, by dialect; the first that holds an embedding counts.
TARGET_PREFIXES = ("model.language_model.", "language_model.model.", "model.")

# Target tensors that are left out on purpose, as patterns on the name in the checkpoint.
IGNORED_TARGET = {
    "*vision_tower.*": "vision",
    "*audio_tower.*": "audio",
    "*embed_vision.*": "vision",
    "*embed_audio.*": "audio",
    "*lm_head.weight": "tied to the embedding",
}

# Target tensors that KV-shared layers may carry and nothing reads.
IGNORED_ON_SHARED_LAYERS = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight")

# Drafter tensors: module name <- name in the checkpoint; `{}` is the rest of the name.
DRAFTER_NAMES = {
    "layers.{}": "model.layers.{}",
    "norm.weight": "model.norm.weight",
    "pre_projection.weight": "pre_projection.weight",
    "post_projection.weight": "post_projection.weight",
}
DRAFTER_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and what its file says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The safetensors of one directory: names, dtypes and shapes at once, values on request."""

    def __init__(self, directory: Path) -> None:
        """Raises InputError for missing, pickled, truncated or absent-from-index files."""
        self.directory = directory
        weight_map = _weight_map(directory)
        self.files = [directory / name for name in sorted(set(weight_map.values())) or ["model.safetensors"]]
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            try:
                with safe_open(file, "pt"):  # checks all that a header may get wrong
                    header, data = _header(file)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a readable safetensors file ({error}); download it again") from error
            for name, facts in header.items():
                start, _ = facts["data_offsets"]
                self.entries[name] = TensorEntry(file, facts["dtype"], tuple(facts["shape"]), data + start)
        self._found = {file: _stamp(file) for file in self.files}
        for name, file_name in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file_name:
                raise InputError(f"{directory / file_name}: the index says that {name} is here; download both again")

    def map(self, name: str) -> Tensor:
        """One tensor as it is stored, mapped into memory: what is not touched is not read."""
        self._check_unchanged(self.entries[name].file)
        with safe_open(self.entries[name].file, "pt") as opened:
            return opened.get_tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One tensor in blocks of whole rows, floats as float32.

        They are read, not mapped: what was read of a mapping counts as the process's memory until it is gone.

        Raises:
            InputError: it holds NaN or infinity, or its file changed since it was opened.
        """
        entry = self.entries[name]
        dtype, (rows, *rest) = DTYPES[entry.dtype], entry.shape or (1,)
        row_bytes = prod(rest) * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                block = torch.empty([count, *rest] if entry.shape else [], dtype=dtype)
                stream.readinto(block.view(-1).view(torch.uint8).numpy().data)
                if dtype.is_floating_point:
                    block = block.float()
                    if not block.isfinite().all():
                        raise InputError(f"{entry.file}: tensor {name} holds NaN or infinity; restore the checkpoint")
                yield block
        self._check_unchanged(entry.file)

    def load(self, name: str) -> Tensor:
        """One tensor, floats as float32; raises as `blocks` does."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        whole = torch.empty(entry.shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
        at = 0
        for block in self.blocks(name):
            whole.view(-1)[at : at + block.numel()] = block.view(-1)
            at += block.numel()
        return whole

    def sha256(self) -> dict[str, str]:
        """Digest of every weight file, by file name.

        Raises:
            InputError: a file changed since the checkpoint was opened.
        """
        found = {file.name: file_sha256(file) for file in self.files}
        for file in self.files:
            self._check_unchanged(file)
        return found

    def _check_unchanged(self, file: Path) -> None:
        if _stamp(file) != self._found[file]:
            raise InputError(f"{file}: changed while it was read; let its download or training end, then retry")


@dataclass(frozen=True)
class Stored:
    """A reader of one tensor of a checkpoint, as a whole or in blocks of rows."""

    checkpoint: Checkpoint
    name: str

    def __call__(self) -> Tensor:
        return self.checkpoint.load(self.name)

    def blocks(self) -> Iterator[Tensor]:
        return self.checkpoint.blocks(self.name)


def row_blocks(read: Callable[[], Tensor]) -> Iterator[Tensor]:
    """What a reader reads, in blocks of rows if it can."""
    return read.blocks() if isinstance(read, Stored) else iter((read(),))


def target_weights(checkpoint: Checkpoint, config: TextConfig, mapped: bool = False) -> Weights:
    """Readers for every parameter of `Target`; every tensor of the checkpoint is used, ignored by a rule or refused.

    `mapped` weights are those of `Checkpoint.map`.

    Raises:
        InputError: a tensor is missing, unknown, of the wrong shape or quantized.
    """
    names = checkpoint.entries.keys()
    prefix = next((p for p in TARGET_PREFIXES if f"{p}embed_tokens.weight" in names), TARGET_PREFIXES[0])
    shapes = parameter_shapes(lambda: Target(config))
    ignored = _shared_layer_tensors(prefix, range(config.num_kv_layers, config.num_hidden_layers))
    ignored |= {name for name in names for pattern in IGNORED_TARGET if fnmatch.fnmatchcase(name, pattern)}
    names_in_file = {name: prefix + name for name in shapes}
    _refuse_unknown(checkpoint, set(names_in_file.values()) | ignored)
    readers = _select(checkpoint, names_in_file, shapes)
    return {n: functools.partial(checkpoint.map, r.name) for n, r in readers.items()} if mapped else readers


def drafter_weights(
    checkpoint: Checkpoint, config: DrafterConfig, table: ClusterTable | None, target: Weights
) -> Weights:
    """Readers for every parameter of `Drafter`, whose head is clustered if a table is given, else dense.

    Raises:
        InputError: a tensor is missing, unknown, of the wrong shape or quantized.
    """
    shapes = parameter_shapes(lambda: Drafter(config, None))
    names_in_file = drafter_names(shapes)
    ignored = _shared_layer_tensors("model.", range(config.text.num_hidden_layers))
    _refuse_unknown(checkpoint, {*names_in_file.values(), CENTROIDS, TOKEN_ORDERING, "lm_head.weight"} | ignored)
    weights: dict[str, Callable[[], Tensor]] = dict(_select(checkpoint, names_in_file, shapes))
    weights["target_embed_tokens.weight"] = target["embed_tokens.weight"]
    if table is not None:
        embedding, members = weights.pop("head.weight"), torch.from_numpy(table.members)
        weights["head.centroids"] = lambda: torch.from_numpy(table.centroids)
        weights["head.clusters"] = lambda: embedding()[members.flatten()].reshape(len(members), -1)
        weights["head.token_ids"] = members.float
    return weights


def drafter_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in the checkpoint of each parameter of a drafter with a dense head; the target's embedding is not there."""
    names = {"head.weight": DRAFTER_EMBEDDING}
    for ours, stored in DRAFTER_NAMES.items():
        stem = ours.removesuffix("{}")
        names |= {name: stored.replace("{}", name.removeprefix(stem)) for name in shapes if name.startswith(stem)}
    return names


def read_cluster_table(checkpoint: Checkpoint, config: DrafterConfig) -> ClusterTable | None:
    """The clusters that the checkpoint carries, None for a dense head: presence decides, whatever the config says.

    Raises:
        InputError: half a table, one that does not fit the config, or an ordering that is not a permutation.
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
            raise InputError(f"{checkpoint.directory}: tensor {name} is missing, but its partner is there")
        _check_entry(entries[name], name, expected[name], dtypes)
    table = ClusterTable(checkpoint.load(CENTROIDS).numpy(), checkpoint.load(TOKEN_ORDERING).long().numpy())
    source = str(entries[TOKEN_ORDERING].file)
    table.check(source)
    if config.text.vocab_size % config.num_centroids:
        raise InputError(
            f"{source}: {config.text.vocab_size} tokens do not split into {config.num_centroids} clusters of equal"
            " size; check num_centroids"
        )
    if config.centroid_intermediate_top_k > config.num_centroids:
        raise InputError(
            f"{checkpoint.directory}: centroid_intermediate_top_k is {config.centroid_intermediate_top_k}, more than"
            f" the {config.num_centroids} clusters there are; correct config.json"
        )
    return table


def checkpoint_json(directory: Path, name: str) -> dict[str, Any]:
    """An optional JSON file of a checkpoint, empty if it is not there."""
    path = directory / name
    return read_object(path) if path.exists() else {}


def load_module(build: Callable[[], AnyModule], weights: Weights) -> AnyModule:
    """The module that `build` makes, with its weights, ready for inference; nothing is held twice.

    Parameters that no weight is given for are not there.
    """
    with torch.device("meta"):
        module = build()
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(weights[name](), requires_grad=False) if name in weights else None
        setattr(module.get_submodule(owner), leaf, value)
    return module.eval()


def parameter_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, by name, of the module that `build` makes; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}


def _select(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Stored]:
    """Readers for module parameters whose names in the checkpoint are given; shapes and dtypes must fit."""
    for name, stored in names.items():
        entry = checkpoint.entries.get(stored)
        if entry is None:
            raise InputError(f"{checkpoint.directory}: tensor {stored} is missing; restore the checkpoint")
        _check_entry(entry, stored, shapes[name], FLOAT_DTYPES)
    return {name: Stored(checkpoint, stored) for name, stored in names.items()}


def _check_entry(entry: TensorEntry, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if entry.shape != shape:
        raise InputError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)};"
            " the weights and the config belong to different models"
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
            f"{checkpoint.entries[unknown[0]].file}: unknown tensor {unknown[0]}{more}: neither mapped nor ignored by"
            " a rule; this is not a plain Gemma 4 checkpoint of that kind"
        )


def _shared_layer_tensors(prefix: str, layers: range) -> set[str]:
    return {f"{prefix}layers.{i}.self_attn.{name}" for i in layers for name in IGNORED_ON_SHARED_LAYERS}


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's facts on each tensor, and where its data begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    facts = file.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _weight_map(directory: Path) -> dict[str, str]:
    """File of each tensor as the index says; empty for a checkpoint of one file."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return {}
    if not index.exists():
        pickled = sorted(path for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickled:
            raise InputError(
                f"{pickled[0]}: pickled weights are refused, because loading them runs code; convert to safetensors"
            )
        raise InputError(f"{directory}: neither model.safetensors nor {index.name} is there; download the weights")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty; download the index again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map must give each tensor a file name; download the index again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: names {name!r}, expected a safetensors file in the same directory")
        if not (directory / name).exists():
            raise InputError(f"{directory / name}: named in {index.name} but absent; download the shard")
    return weight_map
