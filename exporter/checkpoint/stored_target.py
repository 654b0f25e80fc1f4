"""A target in eager torch whose weights stay as they are stored, and are widened while they are used.

Floats stay in their file's dtype and are mapped from it, integers stay integers. A target of any size then needs
little more memory than its checkpoint or its recipe takes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.checkpoint.adapters import Factors, MergedReader
from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader
from exporter.modeling.layers import Ops, rms_norm
from exporter.modeling.target import Target
from exporter.modeling.weights import AnyModule, constant, load_module
from exporter.quantization.numbers import Quantized

_BLOCK_ROWS = 1 << 10  # rows of a matrix that are widened at once; they stay in a core's cache


@dataclass(frozen=True)
class RowsOnRead:
    """A table whose rows are converted to float32 when they are read.

    Attributes:
        read: reads the rows of ids [T] int64 as [T, columns] float32.
    """

    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adapted:
    """A matrix and what adapters add to it, which is added to the product; a table's rows are merged when read.

    Attributes:
        weight: [rows, columns], mapped in the dtype of its file.
        changes: what is added.
        read: reads the merged rows of ids [T] int64 as [T, columns] float32.
    """

    weight: Tensor
    changes: tuple[Factors, ...]
    read: Callable[[Tensor], Tensor]


Weight = Tensor | Quantized | RowsOnRead | Adapted
RoundInputs = Callable[[Tensor, Quantized], Tensor]


def stored_ops(dtype: torch.dtype = torch.float32, round_inputs: RoundInputs | None = None) -> Ops:
    """Return operations that accept weights in their stored form.

    Args:
        dtype: float dtype that weights are widened to, and that the operations compute in.
        round_inputs: rounds the inputs of a quantized matrix as a backend's kernels do; None to leave them as they are,
            so that the weights of the recipe are the only source of error.
    """

    def widened(weight: Tensor | Quantized) -> Tensor:
        return (weight if isinstance(weight, Tensor) else weight.dequantize()).to(dtype)

    def linear(x: Tensor, weight: Weight) -> Tensor:
        assert not isinstance(weight, RowsOnRead)
        if isinstance(weight, Adapted):
            added = (linear(linear(x, part.columns), part.rows) * part.scale for part in weight.changes)
            return sum(added, linear(x, weight.weight))
        if round_inputs is not None and isinstance(weight, Quantized):
            x = round_inputs(x, weight)
        if len(weight if isinstance(weight, Tensor) else weight.numbers) <= _BLOCK_ROWS:
            return F.linear(x, widened(weight))
        if isinstance(weight, Tensor):
            return torch.cat([F.linear(x, widened(rows)) for rows in weight.split(_BLOCK_ROWS)], dim=-1)
        parts = zip(weight.numbers.split(_BLOCK_ROWS), weight.scales.split(_BLOCK_ROWS), strict=True)
        return torch.cat([F.linear(x, widened(Quantized(*p, weight.bits))) for p in parts], dim=-1)

    def embedding(ids: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, RowsOnRead | Adapted):
            return weight.read(ids).to(dtype)
        if isinstance(weight, Quantized):
            return weight.rows(ids).to(dtype)
        return weight[ids].to(dtype)

    def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return rms_norm(x, None if weight is None else weight.to(dtype), eps)

    return Ops(linear=linear, embedding=embedding, rms_norm=norm)


def stored_weights(pair: Pair, left_out: Collection[str] = ()) -> dict[str, Weight]:
    """Return the weights of a target's checkpoint, with nothing folded or rounded, as its files store them.

    Args:
        pair: the target and its drafter.
        left_out: names of weights that are not wanted.
    """
    tables = {PER_LAYER, EMBEDDING} - {pair.head}
    weights: dict[str, Weight] = {}
    for name, read in pair.mapped_target_weights.items():
        if name in left_out:
            continue
        if isinstance(read, MergedReader):
            changes = tuple(change.factors() for change in read.changes)
            weights[name] = Adapted(read.read.checkpoint.map(read.read.name), changes, read.rows)
        elif not isinstance(read, IntegerReader):
            weights[name] = read()
        elif name in tables and read.rows is not None:
            weights[name] = RowsOnRead(read.rows)
        else:
            weights[name] = Quantized.join(read.quantized_blocks())
    return weights


def rows_reader(pair: Pair, name: str) -> Callable[[Tensor], Tensor]:
    """Return a function that reads rows of a table of the target's checkpoint: ids [T] int64 to [T, columns] float32.

    Args:
        pair: the target and its drafter.
        name: `EMBEDDING` or `PER_LAYER`.
    """
    read = pair.mapped_target_weights[name]
    if isinstance(read, IntegerReader | MergedReader):
        assert read.rows is not None
        return read.rows
    table = read()
    return lambda ids: table[ids].float()


def open_target(pair: Pair, ops: Ops) -> Target:
    """Return the target of a pair with `stored_weights`.

    Args:
        pair: the target and its drafter.
        ops: what `stored_ops` returns, or other operations that accept such weights.
    """
    return load_stored(lambda: pair.new_target(ops), stored_weights(pair))


def load_stored(build: Callable[[], AnyModule], weights: Mapping[str, Weight]) -> AnyModule:
    """Do what `load_module` does, for weights that need not be tensors."""
    module = load_module(build, {n: constant(w) for n, w in weights.items() if isinstance(w, Tensor)})
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
            setattr(module.get_submodule(owner), leaf, weight)
    return module
