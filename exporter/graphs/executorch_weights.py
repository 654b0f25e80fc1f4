"""Weights of an ExecuTorch program: as XNNPACK can hold them, and where a program has them."""

import functools
import hashlib
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

from exporter.graphs.parts import GraphParts
from exporter.graphs.tables import Part, table_metadata
from exporter.modeling.layers import Ops
from exporter.modeling.weights import load_module
from exporter.quantization.numbers import Quantized, Scales, pack
from runtime_ref.manifest import Progress
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet

SCALES = Scales(torch.bfloat16, negative=False)  # of groups, that XNNPACK takes
MIN_BITS = 4  # of a number: XNNPACK has kernels for fewer, but ExecuTorch does not serialize them


def module_with_weights(part: GraphParts, progress: Progress, ops: Ops) -> nn.Module:
    """Return a graph with its weights; quantized ones are torchao's tensors, which XNNPACK's partitioner recognizes."""
    factors: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        weight = held_weight(part, name, progress)
        if isinstance(weight, Tensor):
            return weight
        if weight.factors is not None:
            factors[name.rpartition(".")[0]] = weight.factors
        return _int_tensor(weight.integers)

    module = load_module(lambda: part.model(ops), {name: functools.partial(read, name) for name in part.weights})
    for owner, values in factors.items():
        module.get_submodule(owner).register_parameter("factors", nn.Parameter(values, requires_grad=False))
    return part.graph(module, False)


@dataclass(frozen=True)
class HeldIntegers:
    """A quantized weight as XNNPACK can hold it.

    Attributes:
        integers: of 4 or 8 bits, with scales that it takes.
        factors: [rows] float32, scales of rows that it does not take, which are applied after the product; the scales
            above are then 1. None if it takes them.
    """

    integers: Quantized
    factors: Tensor | None


def held_weight(part: GraphParts, name: str, progress: Progress = lambda *_: None) -> Tensor | HeldIntegers:
    """Read a weight as the program holds it; integers of 2 bits are widened, and no value changes.

    Only a checkpoint's own integers can have scales that XNNPACK does not take.
    """
    weight = part.whole(name, SCALES, progress)
    if isinstance(weight, Tensor):
        return weight
    weight = replace(weight, bits=max(weight.bits, MIN_BITS))
    scales = weight.scales
    if (scales > 0 if weight.bits == 8 else SCALES.holds(scales)).all():
        return HeldIntegers(weight, None)
    assert scales.shape[1] == 1, name  # exports refuse other groups first
    return HeldIntegers(replace(weight, scales=torch.ones_like(scales)), scales[:, 0].contiguous())


def _int_tensor(weight: Quantized) -> Tensor:
    return IntxUnpackedToInt8Tensor(
        weight.numbers,
        weight.scales,
        torch.zeros_like(weight.scales, dtype=torch.int8),
        getattr(torch, f"int{weight.bits}"),
        (1, weight.group_size),
        torch.float32,
        "int8_asym_per_token",
    )


def head_table(file: Path, part: GraphParts, name: str) -> dict[str, Any]:
    """Return the manifest entry of the rows of the target's head.

    A token embedding that it is, is stored once: a program holds the head's weight row by row, so rows can be read.
    """
    weight = held_weight(part, name)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as program:
        offsets = [_offset(program, array) for array in held_arrays(weight)]
    rows, columns = part.shapes[name]
    places: list[list[Part]] = [[{"file": file.name, "offset": offset, "rows": rows}] for offset in offsets]
    if isinstance(weight, Tensor):
        return table_metadata((rows, columns), "float32", places[0], 4 * columns)
    bits, is_bfloat16 = weight.integers.bits, weight.integers.bits < 8 and weight.factors is None
    scales = places[-1], "bfloat16" if is_bfloat16 else "float32"
    encoding = "int8" if bits == 8 else f"uint{bits}"
    row_bytes = -(-columns * bits // 8)
    return table_metadata((rows, columns), encoding, places[0], row_bytes, weight.integers.group_size, scales)


def _offset(program: mmap.mmap, array: np.ndarray) -> int:
    """Return the byte offset at which a program holds an array."""
    content = array.tobytes()
    # Search for the piece of 64 bytes with the most distinct bytes: pieces of zeros would match in many places.
    starts = range(0, max(1, len(content) - 64), max(1, len(content) // 256))
    piece = max(starts, key=lambda start: len(set(content[start : start + 64])))
    at = program.find(content[piece : piece + 64])
    while at >= 0:
        with memoryview(program) as view, view[max(0, at - piece) : max(0, at - piece) + len(content)] as candidate:
            if candidate == content:
                return at - piece
        at = program.find(content[piece : piece + 64], at + 1)
    raise AssertionError("the program does not hold the token embedding's bytes")


def held_arrays(weight: Tensor | HeldIntegers) -> list[np.ndarray]:
    """Return a weight as XNNPACK's part of a program holds it: floats, or integers, their scales and factors."""
    if isinstance(weight, Tensor):
        return [weight.contiguous().numpy()]
    integers, factors = weight.integers, [] if weight.factors is None else [weight.factors.numpy()]
    if integers.bits == 8:
        return [integers.numbers.numpy(), integers.scales.numpy(), *factors]
    scales = integers.scales.to(torch.bfloat16).view(torch.int16).numpy()
    return [pack(integers.numbers, integers.bits), scales, *factors]


def held_digests(file: Path) -> set[bytes]:
    """Return the digests of all constants of a program, which has no names for them."""
    return {digest(blob) for blob in held_blobs(file)}


def held_blobs(file: Path) -> list[bytes]:
    """Return all constants of a program."""
    with quiet(*EXECUTORCH_LOGGERS):
        program = deserialize_pte_binary(file.read_bytes())
    blobs = [buffer.storage for buffer in program.program.constant_buffer]
    return blobs + (program.named_data.buffers if program.named_data else [])


def digest(blob: bytes) -> bytes:
    """Return the digest of bytes padded with zeros to the alignment of constants; a program may hold them unpadded."""
    return hashlib.sha256(blob + bytes(-len(blob) % 16)).digest()
