"""Embedding tables of a bundle: their manifest entries, and the file of the per-layer embeddings (PLE)."""

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import row_blocks
from exporter.graphs.split_files import SplitFile, split_path
from exporter.modeling.config import TextConfig
from exporter.quantization.numbers import Scales, pack, quantize
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.manifest import Progress

# The tables as parameters of `Target`.
EMBEDDING = "embed_tokens.weight"
PER_LAYER = "embed_tokens_per_layer.weight"
PER_LAYER_FILE = "per_layer.table"
PER_LAYER_SCALES = Scales(torch.float16)

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


def write_per_layer(
    directory: Path, pair: Pair, width: Width, max_file_bytes: int | None, progress: Progress
) -> dict[str, Any]:
    """Write the PLE table, followed by its scales in float16, one for each token and layer.

    Args:
        directory: an existing directory; the file is `PER_LAYER_FILE` in it.
        pair: the pair whose target has the table.
        width: bits of the stored numbers, or `FLOAT`; its group size is not used.
        max_file_bytes: largest size of each file; None for one file.
        progress: called with the table's name and the bytes of float32 of each block.

    Returns:
        The table's manifest entry.
    """
    rows = row_bytes = 0
    scales = []
    data_parts: list[Part] = []
    scale_parts: list[Part] = []
    with SplitFile(directory / PER_LAYER_FILE, max_file_bytes) as file:
        for numbers, block_scales in per_layer_blocks(pair, width, progress):
            file.write_rows(numbers, data_parts)
            scales.append(block_scales)
            rows, row_bytes = rows + len(numbers), numbers[:1].nbytes
        for block_scales in scales if width != FLOAT else []:
            file.write_rows(block_scales, scale_parts)
    group_size = pair.target.hidden_size_per_layer_input
    shape = (rows, pair.target.num_hidden_layers * group_size)
    if width == FLOAT:
        return table_metadata(shape, "float32", data_parts, row_bytes)
    return table_metadata(shape, f"uint{width.bits}", data_parts, row_bytes, group_size, (scale_parts, "float16"))


def per_layer_bytes(config: TextConfig, width: Width) -> int:
    """Return the bytes of the PLE table that `write_per_layer` writes, with its scales."""
    layers, size = config.num_hidden_layers, config.hidden_size_per_layer_input
    scale_bytes = 0 if width == FLOAT else 2 * layers
    return config.vocab_size_per_layer_input * (-(-layers * size * width.bits // 8) + scale_bytes)


def differing_rows(file: Path, pair: Pair, width: Width) -> list[str]:
    """Compare the files of the PLE table, byte by byte, with what `write_per_layer` would write.

    Args:
        file: the bundle's `PER_LAYER_FILE`, the first of them.
        pair: the pair whose target has the table.
        width: bits of the stored numbers, or `FLOAT`.

    Returns:
        A list with the table's name if the file differs, else an empty list.
    """
    files = itertools.takewhile(Path.exists, (split_path(file, number) for number in itertools.count()))
    with contextlib.closing(_contents(files)) as contents:
        next(contents)
        scales = []
        for numbers, block_scales in per_layer_blocks(pair, width):
            if contents.send(numbers.nbytes) != numbers.tobytes():
                return [PER_LAYER]
            scales.append(block_scales.tobytes())
        expected = b"".join(scales)
        return [] if contents.send(len(expected) + 1) == expected else [PER_LAYER]


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


def per_layer_blocks(
    pair: Pair, width: Width, progress: Progress = lambda *_: None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the PLE table in blocks of rows as its file holds them, each with its scales.

    Args:
        pair: the pair whose target has the table.
        width: bits of the stored numbers, or `FLOAT`.
        progress: called with the table's name and the bytes of float32 of each block.

    Yields:
        Rows, float32 [rows, layers*P] or packed uint8 [rows, row_bytes], and their scales [rows, layers] float16, which
        are empty for `FLOAT`.
    """
    group_size = pair.target.hidden_size_per_layer_input
    for block in row_blocks(pair.target_weights[PER_LAYER]):
        if width == FLOAT:
            yield block.numpy(), np.empty(0, np.float16)
        else:
            quantized = quantize(block, Width(width.bits, group_size), PER_LAYER_SCALES)
            yield pack(quantized.numbers, width.bits), quantized.scales.numpy().astype(np.float16)
        progress(PER_LAYER, 4 * block.numel())
