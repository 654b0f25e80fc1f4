"""Embedding tables of a bundle: their manifest entries, and the files of those that lie outside the graphs."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint.names import EMBEDDING, PER_LAYER
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.split_files import SplitFile, split_path
from exporter.quantization.numbers import Quantized, Scales, pack, quantize
from exporter.quantization.recipes import Recipe, Rule
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.manifest import EMBEDDING as EMBEDDING_ENTRY
from runtime_ref.manifest import PER_LAYER as PER_LAYER_ENTRY
from runtime_ref.manifest import Progress

FILES = {PER_LAYER: "per_layer.table", EMBEDDING: "embedding.table"}

Part = dict[str, int | str]  # `file`, `offset` and `rows`


def table_metadata(
    shape: tuple[int, int],
    encoding: str,
    data: list[Part],
    row_bytes: int,
    group_size: int | None = None,
    scales: tuple[list[Part], str] | None = None,
) -> dict[str, Any]:
    """Return a table's manifest entry, which `runtime_ref.tables` reads. FORMAT.md, "Tables", specifies it.

    Args:
        shape: rows and columns.
        encoding: how a row holds its numbers, a key of `runtime_ref.tables.ENCODING_BITS`.
        data: the files that hold the rows, in order: `file`, `offset` of its first row in bytes, `rows`.
        row_bytes: bytes from one row to the next.
        group_size: columns that share a scale; None for all columns.
        scales: the same for the scales, and their dtype; None for a table without scales.
    """
    rows, columns = shape
    metadata: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "encoding": encoding,
        "row_bytes": row_bytes,
        "group_size": group_size or columns,
        "data": {"parts": data},
    }
    if scales is not None:
        metadata["scales"] = {"dtype": scales[1], "parts": scales[0]}
    return metadata


@dataclass(frozen=True)
class OutsideTable:
    """A table of the target whose rows the runtime reads from a file of its own.

    Attributes:
        name: the table as a parameter of `Target`.
        file: name of the bundle's file.
        read: reads the checkpoint's table.
        shape: its rows and columns.
        width: how it is stored, as recipes say it.
        group_size: how many numbers of a row share a scale.
        scales: dtype of the scales.
    """

    name: str
    file: str
    read: Callable[[], Tensor]
    shape: tuple[int, int]
    width: Width
    group_size: int
    scales: Scales

    @property
    def is_kept(self) -> bool:
        """Whether no value changes: floats stay floats, and integers integers."""
        return self.width == FLOAT or isinstance(self.read, IntegerReader)

    def stored(self, rows: Tensor) -> Tensor:
        """Return some of its rows [rows, columns] float32 as the bundle has them."""
        if self.is_kept:
            return rows
        return quantize(rows, Width(self.width.bits, self.group_size), self.scales).dequantize()

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, or files."""
        rows, columns = self.shape
        scale_bytes = 0 if self.width == FLOAT else columns // self.group_size * self.scales.dtype.itemsize
        return rows * (-(-columns * self.width.bits // 8) + scale_bytes)


def outside_tables(pair: Pair, recipe: Recipe) -> dict[str, OutsideTable]:
    """Return the target's tables that lie outside its graph, by their names in the manifest.

    They are the per-layer embeddings (PLE), which have a scale for each token and layer unless the recipe asks for
    groups, and the token embedding where the head is another matrix.

    Args:
        pair: the target and its drafter.
        recipe: how many bits each matrix is stored in.
    """
    config = pair.target
    per_layer = config.num_hidden_layers * config.hidden_size_per_layer_input
    tables = {
        PER_LAYER_ENTRY: _outside(
            pair, recipe, PER_LAYER, (config.vocab_size_per_layer_input, per_layer), config.hidden_size_per_layer_input
        )
    }
    if pair.head != EMBEDDING:
        shape = (config.vocab_size, config.hidden_size)
        tables[EMBEDDING_ENTRY] = _outside(pair, recipe, EMBEDDING, shape, config.hidden_size)
    return tables


def _outside(pair: Pair, recipe: Recipe, name: str, shape: tuple[int, int], shared_by: int) -> OutsideTable:
    """The table of a name; a scale is shared by so many numbers unless the recipe asks for groups that divide them."""
    read, width = pair.target_weights[name], recipe.width(f"target.{name}")
    if width.group_size is not None and shared_by % width.group_size:
        width = Width(width.bits)
    # Scales of the checkpoint stay as they are.
    scales = Scales(torch.float32 if isinstance(read, IntegerReader) else torch.float16)
    width = read.kept_in(width) if isinstance(read, IntegerReader) else width
    return OutsideTable(name, FILES[name], read, shape, width, width.group_size or shared_by, scales)


def table_bytes(pair: Pair, name: str, width: Width) -> int:
    """Return the bytes of a table outside the graphs in a width, with its scales, by its name as a parameter."""
    tables = outside_tables(pair, Recipe("", (Rule(f"target.{name}", width),))).values()
    return next(table.num_bytes for table in tables if table.name == name)


def write_table(directory: Path, table: OutsideTable, max_file_bytes: int | None, progress: Progress) -> dict[str, Any]:
    """Write a table, followed by its scales.

    Args:
        directory: an existing directory.
        table: the table; its file is written.
        max_file_bytes: largest size of each file; None for one file.
        progress: called with the table's name and the bytes of float32 of each block.

    Returns:
        The table's manifest entry.
    """
    row_bytes = 0
    scales = []
    data_parts: list[Part] = []
    scale_parts: list[Part] = []
    with SplitFile(directory / table.file, max_file_bytes) as file:
        for numbers, block_scales in _table_blocks(table, progress):
            file.write_rows(numbers, data_parts)
            scales.append(block_scales)
            row_bytes = numbers[:1].nbytes
        for block_scales in scales if table.width != FLOAT else []:
            file.write_rows(block_scales, scale_parts)
    if table.width == FLOAT:
        return table_metadata(table.shape, "float32", data_parts, row_bytes)
    scales_at = scale_parts, str(table.scales.dtype).removeprefix("torch.")
    return table_metadata(table.shape, f"uint{table.width.bits}", data_parts, row_bytes, table.group_size, scales_at)


def differing_rows(file: Path, table: OutsideTable) -> list[str]:
    """Compare the files of a table, byte by byte, with what `write_table` would write.

    Args:
        file: the first of them.
        table: the table.

    Returns:
        A list with the table's name if the file differs, else an empty list.
    """
    files = itertools.takewhile(Path.exists, (split_path(file, number) for number in itertools.count()))
    with contextlib.closing(_contents(files)) as contents:
        next(contents)
        scales = []
        for numbers, block_scales in _table_blocks(table):
            if contents.send(numbers.nbytes) != numbers.tobytes():
                return [table.name]
            scales.append(block_scales.tobytes())
        expected = b"".join(scales)
        return [] if contents.send(len(expected) + 1) == expected else [table.name]


def _contents(files: Iterable[Path]) -> Generator[bytes, int, None]:
    """Yield as many bytes as are asked for by `send`, of files that follow one another; fewer at their end."""
    wanted = yield b""
    read = b""
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(wanted - len(read)):
                read += block
                if len(read) == wanted:
                    wanted, read = (yield read), b""
    while True:
        yield read
        read = b""


def _table_blocks(table: OutsideTable, progress: Progress = lambda *_: None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a table in blocks of rows as its file holds them, each with its scales, of which floats have none."""
    for block in _stored_blocks(table):
        if isinstance(block, Quantized):
            scales = block.scales.to(table.scales.dtype).numpy()
            yield pack(block.numbers, block.bits), scales
            progress(table.name, 4 * block.numbers.numel())
        else:
            yield block.numpy(), np.empty(0, np.float32)
            progress(table.name, 4 * block.numel())


def _stored_blocks(table: OutsideTable) -> Iterator[Tensor | Quantized]:
    if table.width == FLOAT:
        yield from row_blocks(table.read)
    elif isinstance(table.read, IntegerReader):
        yield from (block.held_as(Width(table.width.bits, table.group_size)) for block in table.read.quantized_blocks())
    else:
        width = Width(table.width.bits, table.group_size)
        yield from (quantize(block, width, table.scales) for block in row_blocks(table.read))
