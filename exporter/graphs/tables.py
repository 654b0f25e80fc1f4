"""Embedding tables in a bundle: where each lies in its files, and the file of the per-layer embeddings (PLE)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import row_blocks
from exporter.quantization.numbers import FLOAT, Scales, Width, pack, quantize
from runtime_ref.manifest import Progress

EMBEDDING = "embed_tokens.weight"
PER_LAYER = "embed_tokens_per_layer.weight"
PER_LAYER_FILE = "per_layer.table"
PER_LAYER_SCALES = Scales(torch.float16)


def table_facts(
    shape: tuple[int, int],
    encoding: str,
    data: tuple[str, int],
    row_bytes: int,
    group: int | None = None,
    scales: tuple[str, int, str] | None = None,
) -> dict[str, Any]:
    """What the manifest says of a table, as `runtime_ref.tables` reads it; places are a file and an offset."""
    rows, columns = shape
    facts: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "encoding": encoding,
        "row_bytes": row_bytes,
        "group_size": group or columns,
        "data": {"file": data[0], "offset": data[1]},
    }
    if scales is not None:
        facts["scales"] = dict(zip(("file", "offset", "dtype"), scales, strict=True))
    return facts


def write_per_layer(directory: Path, pair: Pair, width: Width, progress: Progress) -> dict[str, Any]:
    """Write the PLE table, then its scales, one for each token and layer in float16, and return its facts."""
    rows = row_bytes = 0
    scales = []
    with (directory / PER_LAYER_FILE).open("wb") as stream:
        for numbers, scale in per_layer_blocks(pair, width, progress):
            stream.write(numbers.data)
            scales += [scale]
            rows, row_bytes = rows + len(numbers), numbers[:1].nbytes
        at = stream.tell()
        for scale in scales:
            stream.write(scale.data)
    group = pair.target.hidden_size_per_layer_input
    shape = (rows, pair.target.num_hidden_layers * group)
    if width == FLOAT:
        return table_facts(shape, "float32", (PER_LAYER_FILE, 0), row_bytes)
    place = (PER_LAYER_FILE, at, "float16")
    return table_facts(shape, f"uint{width.bits}", (PER_LAYER_FILE, 0), row_bytes, group, place)


def differing_rows(file: Path, pair: Pair, width: Width) -> list[str]:
    """The PLE table's name if its file is not what the checkpoint gives, byte by byte."""
    with file.open("rb") as stream:
        scales = []
        for numbers, scale in per_layer_blocks(pair, width):
            if stream.read(numbers.nbytes) != numbers.tobytes():
                return [PER_LAYER]
            scales.append(scale.tobytes())
        return [] if stream.read() == b"".join(scales) else [PER_LAYER]


def per_layer_blocks(
    pair: Pair, width: Width, progress: Progress = lambda *_: None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The PLE table in blocks of rows as its file holds them, and their scales."""
    group = pair.target.hidden_size_per_layer_input
    for block in row_blocks(pair.target_weights[PER_LAYER]):
        if width == FLOAT:
            yield block.numpy(), np.empty(0, np.float16)
        else:
            quantized = quantize(block, Width(width.bits, group), PER_LAYER_SCALES)
            yield pack(quantized.numbers, width.bits), quantized.scales.numpy().astype(np.float16)
        progress(PER_LAYER, 4 * block.numel())
