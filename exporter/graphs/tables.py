"""Embedding tables of a bundle: their manifest entries, and the file of the per-layer embeddings (PLE)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import row_blocks
from exporter.quantization.numbers import Scales, pack, quantize
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.manifest import Progress

# The tables as parameters of `Target`.
EMBEDDING = "embed_tokens.weight"
PER_LAYER = "embed_tokens_per_layer.weight"
PER_LAYER_FILE = "per_layer.table"
PER_LAYER_SCALES = Scales(torch.float16)


def table_metadata(
    shape: tuple[int, int],
    encoding: str,
    data: tuple[str, int],
    row_bytes: int,
    group_size: int | None = None,
    scales: tuple[str, int, str] | None = None,
) -> dict[str, Any]:
    """Return a table's manifest entry, which `runtime_ref.tables` reads. FORMAT.md, "Tables", specifies it.

    Args:
        shape: rows and columns.
        encoding: how a row holds its numbers, a key of `runtime_ref.tables.ENCODING_BITS`.
        data: file name and byte offset of row 0.
        row_bytes: bytes from one row to the next.
        group_size: columns that share a scale; None for all columns.
        scales: file name, byte offset and dtype of the scales; None for a table without scales.
    """
    rows, columns = shape
    metadata: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "encoding": encoding,
        "row_bytes": row_bytes,
        "group_size": group_size or columns,
        "data": {"file": data[0], "offset": data[1]},
    }
    if scales is not None:
        metadata["scales"] = dict(zip(("file", "offset", "dtype"), scales, strict=True))
    return metadata


def write_per_layer(directory: Path, pair: Pair, width: Width, progress: Progress) -> dict[str, Any]:
    """Write the PLE table, followed by its scales in float16, one for each token and layer.

    Args:
        directory: an existing directory; the file is `PER_LAYER_FILE` in it.
        pair: the pair whose target has the table.
        width: bits of the stored numbers, or `FLOAT`; its group size is not used.
        progress: called with the table's name and the bytes of float32 of each block.

    Returns:
        The table's manifest entry.
    """
    rows = row_bytes = 0
    scales = []
    with (directory / PER_LAYER_FILE).open("wb") as stream:
        for numbers, block_scales in per_layer_blocks(pair, width, progress):
            stream.write(numbers.data)
            scales.append(block_scales)
            rows, row_bytes = rows + len(numbers), numbers[:1].nbytes
        scales_offset = stream.tell()
        for block_scales in scales:
            stream.write(block_scales.data)
    group_size = pair.target.hidden_size_per_layer_input
    shape = (rows, pair.target.num_hidden_layers * group_size)
    if width == FLOAT:
        return table_metadata(shape, "float32", (PER_LAYER_FILE, 0), row_bytes)
    stored_scales = (PER_LAYER_FILE, scales_offset, "float16")
    return table_metadata(shape, f"uint{width.bits}", (PER_LAYER_FILE, 0), row_bytes, group_size, stored_scales)


def differing_rows(file: Path, pair: Pair, width: Width) -> list[str]:
    """Compare the file of the PLE table, byte by byte, with what `write_per_layer` would write.

    Args:
        file: the bundle's `PER_LAYER_FILE`.
        pair: the pair whose target has the table.
        width: bits of the stored numbers, or `FLOAT`.

    Returns:
        A list with the table's name if the file differs, else an empty list.
    """
    with file.open("rb") as stream:
        scales = []
        for numbers, block_scales in per_layer_blocks(pair, width):
            if stream.read(numbers.nbytes) != numbers.tobytes():
                return [PER_LAYER]
            scales.append(block_scales.tobytes())
        return [] if stream.read() == b"".join(scales) else [PER_LAYER]


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
