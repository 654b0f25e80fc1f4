"""Merge LoRA adapters into a target's weights while they are read, as `merge_and_unload` of PEFT 0.21.2 does.

PEFT saves an adapter as adapter_config.json and adapter_model.safetensors. For a module `X` the latter has `X.lora_A`
[r, columns] and `X.lora_B` [rows, r], for a table `X.lora_embedding_A` [r, rows] and `X.lora_embedding_B`
[columns, r], perhaps with `X.base_layer.weight`, which they are added to, or, for one of `modules_to_save`, a whole new
`X.weight`.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.names import EMBEDDING, TARGET_PREFIXES
from exporter.checkpoint.other_forms import ADAPTER_CONFIG, is_of_towers
from exporter.checkpoint.tensors import FLOAT_DTYPES, Checkpoint, IntegerReader, TensorEntry, TensorReader
from exporter.checkpoint.values import boolean, json_object, positive_int, read_object
from exporter.modeling.target import OWN_HEAD
from exporter.modeling.weights import Weights
from runtime_ref.chat import CHAT_TEMPLATE
from runtime_ref.errors import InputError
from runtime_ref.pointers import is_present
from runtime_ref.tokenizer import TOKENIZER

ADAPTER_WEIGHTS = "adapter_model"
BASE = ".base_layer.weight"  # end of the name of what a low rank is added to; PEFT saves that of embeddings
MAX_ALPHA = 1e30
MODEL_PREFIX = "base_model.model."

# Keys of adapter_config.json that are read here, or that say how the adapter was trained.
READ_SETTINGS = frozenset(
    """alpha_pattern ensure_weight_tying init_lora_weights lora_alpha peft_type r rank_pattern use_rslora""".split()
)
IGNORED_SETTINGS = frozenset(
    """auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    modules_to_save peft_version qalora_group_size revision runtime_config target_modules task_type""".split()
)
# Other ways of `init_lora_weights` change the model's own weights as well.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# Ends of the names of two factors, that of rows and that of columns, and whether both are stored transposed.
FACTORS = {
    (".lora_B.weight", ".lora_A.weight"): False,
    (".lora_embedding_A", ".lora_embedding_B"): True,
}


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a matrix, mapped: `scale` times the product of two factors of any float dtype.

    Attributes:
        rows: [rows, r].
        columns: [r, columns].
        scale: what their product is multiplied with.
    """

    rows: Tensor
    columns: Tensor
    scale: float

    def of_rows(self, index: Tensor | slice) -> Tensor:
        """Return what is added to some rows, as [.., columns] float32."""
        return (self.rows[index].float() @ self.columns.float()) * self.scale


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix: `scale` times the product of its two factors.

    Attributes:
        checkpoint: the adapter's tensors.
        rows: name of the factor [rows, r], or [r, rows] if `transposed`.
        columns: name of the factor [r, columns], or [columns, r] if `transposed`.
        transposed: how both are stored.
        scale: what their product is multiplied with.
    """

    checkpoint: Checkpoint
    rows: str
    columns: str
    transposed: bool
    scale: float

    def factors(self) -> Factors:
        """Map the factors."""
        found = (self.checkpoint.map(name) for name in (self.rows, self.columns))
        rows, columns = (factor.T if self.transposed else factor for factor in found)
        return Factors(rows, columns, self.scale)


@dataclass(frozen=True)
class MergedReader:
    """A reader of a matrix with what adapters add to it, in float32, as a whole or in blocks of rows.

    Attributes:
        read: the matrix without it.
        changes: what is added, in this order.
    """

    read: TensorReader
    changes: tuple[LowRank, ...]

    def __call__(self) -> Tensor:
        """Return the matrix [rows, columns] float32."""
        whole, start = torch.empty(self.read.checkpoint.entries[self.read.name].shape), 0
        for block in self.blocks():
            whole[start : start + len(block)] = block
            start += len(block)
        return whole

    def blocks(self, block_rows: int | None = None) -> Iterator[Tensor]:
        """Yield the same in blocks of so many rows, or of as many as are read at a time.

        Raises:
            InputError: a number is not finite.
        """
        start, changes = 0, [change.factors() for change in self.changes]
        for block in self.read.blocks(block_rows):
            for change in changes:
                block += change.of_rows(slice(start, start + len(block)))
            if not block.isfinite().all():
                raise InputError(
                    f"{self.changes[-1].checkpoint.directory}: makes {self.read.name} NaN or infinity; restore the"
                    " adapter"
                )
            yield block
            start += len(block)

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return the rows of ids [T] int64, or of a slice, as [T, columns] float32."""
        found = self.read.checkpoint.map(self.read.name)[ids].float()
        for change in self.changes:
            found = found + change.factors().of_rows(ids)
        return found


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, not read yet.

    Attributes:
        checkpoint: its tensors.
        changes: what is added to weights, by the names of `Target`'s parameters.
        bases: readers of what low ranks are added to, where the adapter has that too, by the same names.
        replaced: readers of whole weights that take the place of others, by the same names.
        ties_head: whether a head that is the embedding stays so where the latter is replaced.
        ignored: how many of its tensors belong to parts for images or sound, which are not exported, or to weights that
            nothing reads.
    """

    checkpoint: Checkpoint
    changes: Mapping[str, LowRank]
    bases: Mapping[str, TensorReader]
    replaced: Mapping[str, TensorReader]
    ties_head: bool
    ignored: int


def open_adapter(directory: Path, shapes: Mapping[str, tuple[int, ...]], unread: Collection[str] = ()) -> Adapter:
    """Open an adapter as PEFT saves it; of its tensors, only names and shapes are read.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        shapes: of the target's parameters and of `OWN_HEAD`, by name.
        unread: names of weights that a target may have and that nothing reads.

    Raises:
        InputError: a file is missing or broken, the adapter is of a kind that is not supported, or it does not fit.
    """
    path = directory / ADAPTER_CONFIG
    if not directory.is_dir() or not path.exists():
        raise InputError(
            f"{directory}: has no {ADAPTER_CONFIG}; pass the directory of a LoRA adapter, as PEFT saves it"
        )
    config = read_object(path)
    _refuse_other_kinds(config, path)
    checkpoint = Checkpoint(directory, ADAPTER_WEIGHTS)
    changes: dict[str, LowRank] = {}
    bases: dict[str, TensorReader] = {}
    replaced: dict[str, TensorReader] = {}
    ignored = 0
    for stored, entry in checkpoint.entries.items():
        ends = next((ends for ends in FACTORS if stored.endswith(ends)), None)
        plain = BASE if stored.endswith(BASE) else ".weight"
        end = plain if ends is None else next(end for end in ends if stored.endswith(end))
        module = stored.removeprefix(MODEL_PREFIX).removesuffix(end)
        if is_of_towers(module) or _parameter(module, unread):
            ignored += 1
            continue
        name = _parameter(module, shapes) if stored.endswith(end) else None
        if name is None or (end != ".weight" and len(shapes[name]) != 2):
            raise InputError(
                f"{entry.file}: tensor {entry.name} belongs to no weight of the target that can be merged; merge with"
                " PEFT (merge_and_unload(), then save_pretrained()), and pass the merged checkpoint as --target"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{entry.file}: tensor {entry.name} is {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)};"
                " restore the adapter"
            )
        if ends is None:
            _check_shape(checkpoint, stored, shapes[name])
            kept = bases if end == BASE else replaced
            _refuse_second(name in kept, entry, name)
            kept[name] = TensorReader(checkpoint, stored)
        elif end == ends[0]:
            _refuse_second(name in changes, entry, name)
            columns = stored.removesuffix(end) + ends[1]
            rank, scale = _rank_and_scale(config, module, path)
            sizes = (shapes[name][0], rank), (rank, shapes[name][1])
            for factor, size in zip((stored, columns), sizes, strict=True):
                _check_shape(checkpoint, factor, size[::-1] if FACTORS[ends] else size)
            changes[name] = LowRank(checkpoint, stored, columns, FACTORS[ends], scale)
        elif stored.removesuffix(end) + ends[0] not in checkpoint.entries:
            raise InputError(
                f"{entry.file}: tensor {entry.name.removesuffix(end) + ends[0]} is missing; restore the adapter"
            )
    for name in (changes.keys() & replaced.keys()) | (bases.keys() - changes.keys()):
        raise _unsupported(path, f"both a low rank and a whole weight, or a base without a low rank, for {name}")
    if not changes and not replaced:
        raise InputError(f"{directory}: changes no weight of the target's decoder; leave it out")
    ties_head = boolean(config, "ensure_weight_tying", path, False)
    if ties_head and changes.keys() & {EMBEDDING, OWN_HEAD}:
        raise _unsupported(path, "ensure_weight_tying with a low rank for the embedding")
    return Adapter(checkpoint, changes, bases, replaced, ties_head, ignored)


def merged_weights(weights: Weights, adapter: Adapter, target: Path) -> Weights:
    """Return readers of a target's weights with those that an adapter changes.

    A head that is the embedding stays so if a low rank is added to either, and parts from it if the adapter replaces
    one of them: that is what PEFT does.

    Args:
        weights: readers by name; those that are changed are `TensorReader` or `MergedReader`. A head that config.json
            does not tie to the embedding is among them even if it is equal.
        adapter: what to merge.
        target: the target's directory, for messages.

    Raises:
        InputError: the target's matrices are packed integers, to which nothing can be added.
    """
    merged = dict(weights)
    for name in adapter.changes:
        if isinstance(merged[_own_or_tied(name, merged)], IntegerReader):
            raise InputError(
                f"{target}: has {name} as packed integers, to which {adapter.checkpoint.directory} cannot be added;"
                " pass the checkpoint that it was trained on, unquantized"
            )
    for name, base in adapter.bases.items():  # PEFT reads them in place, over what was merged before
        merged[_own_or_tied(name, merged)] = base
    for name, change in adapter.changes.items():
        name = _own_or_tied(name, merged)
        read = merged[name]
        assert isinstance(read, TensorReader | MergedReader)
        before = read if isinstance(read, MergedReader) else MergedReader(read, ())
        merged[name] = MergedReader(before.read, (*before.changes, change))
    if adapter.replaced.keys() & {EMBEDDING, OWN_HEAD} and not adapter.ties_head:
        merged.setdefault(OWN_HEAD, merged[EMBEDDING])
    return {**merged, **adapter.replaced}


def _own_or_tied(name: str, weights: Weights) -> str:
    return EMBEDDING if name == OWN_HEAD and OWN_HEAD not in weights else name


def adapter_notes(adapter: Adapter, target: Path) -> list[str]:
    """Return what of an adapter's directory does not go into a bundle, in a line each."""
    directory, notes = adapter.checkpoint.directory, []
    if adapter.ignored:
        notes.append(
            f"{directory}: {adapter.ignored} tensors are for images or sound, which are not exported, or for"
            " projections that KV-shared layers do not have"
        )
    for name in (TOKENIZER, CHAT_TEMPLATE):
        own, bundled = directory / name, target / name
        if is_present(own) and not (is_present(bundled) and own.read_bytes() == bundled.read_bytes()):
            notes.append(f"{own}: differs from the target's, which is bundled; copy it there if the adapter needs it")
    return notes


def _parameter(module: str, names: Collection[str]) -> str | None:
    """The one of the target's weights that is a module's; the module may be named as in any form of checkpoint."""
    found = (f"{module.removeprefix(prefix)}.weight" for prefix in TARGET_PREFIXES if module.startswith(prefix))
    return next((name for name in found if name in names), None)


def _refuse_second(has_one: bool, entry: TensorEntry, name: str) -> None:
    if has_one:
        raise InputError(
            f"{entry.file}: tensor {entry.name} is a second one for {name} of the target; remove one of the two"
        )


def _check_shape(checkpoint: Checkpoint, stored: str, expected: tuple[int, ...]) -> None:
    entry = checkpoint.entries.get(stored)
    if entry is None:
        raise InputError(f"{checkpoint.directory}: tensor {stored} is missing; restore the adapter")
    if entry.shape != expected:
        raise InputError(
            f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, expected {list(expected)} by its config"
            " and the target; pass the target that the adapter was trained on"
        )


def _rank_and_scale(config: Mapping[str, Any], module: str, path: Path) -> tuple[int, float]:
    rank = positive_int(_of_pattern(config, "rank_pattern", "r", module, path), "r", path, 8)
    alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", module, path).get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        raise InputError(
            f"{path}: lora_alpha of {module} is {alpha!r:.60}, expected a number below {MAX_ALPHA:g}; correct it there"
            " or in alpha_pattern"
        )
    return rank, alpha / (math.sqrt(rank) if boolean(config, "use_rslora", path, False) else rank)


def _of_pattern(config: Mapping[str, Any], pattern_key: str, key: str, module: str, path: Path) -> dict[str, Any]:
    """The setting of a module: that of the first pattern which matches the end of its name, else that of all."""
    for pattern, value in json_object(config, pattern_key, path, {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return {key: value}
        except re.error as error:
            raise InputError(f"{path}: {pattern_key} has {pattern!r}, which is no pattern ({error})") from error
    return {key: config[key]} if key in config else {}


def _refuse_other_kinds(config: Mapping[str, Any], path: Path) -> None:
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    wrong = f"peft_type {kind!r:.60}" if kind != "LORA" else None
    if wrong is None and start not in PLAIN_STARTS:
        wrong = f"init_lora_weights {start!r:.60}, which changed the model's own weights"
    others = (key for key, value in config.items() if value and key not in READ_SETTINGS | IGNORED_SETTINGS)
    if wrong is None and (key := next(others, None)) is not None:
        wrong = f"{key} {config[key]!r:.60}"
    if wrong is not None:
        raise _unsupported(path, wrong)


def _unsupported(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: has {what}, expected a plain LoRA adapter; merge with PEFT (merge_and_unload(), then"
        " save_pretrained()), and pass the merged checkpoint as --target"
    )
