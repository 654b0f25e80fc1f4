"""The ONNX Runtime backend: trace each graph without weights, then attach weights stored in files made to be mapped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import torch
import torch.nn.functional as F
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import BLOCK_BYTES, IntegerReader
from exporter.graphs.backend import ExportedGraphs
from exporter.graphs.parts import GraphParts
from exporter.graphs.spec import GraphSpec, drafter_graph, target_graph, trace_arguments
from exporter.graphs.split_files import SplitFile, too_large
from exporter.graphs.tables import Part, table_metadata
from exporter.modeling.layers import Ops
from exporter.quantization.activations import rounded_blocks
from exporter.quantization.numbers import Quantized, Scales, pack
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.manifest import Progress
from runtime_ref.manifest_versions import OLDEST_ONNXRUNTIME
from runtime_ref.quiet import quiet
from runtime_ref.tables import unpack

OPSET = 24  # the first with TensorScatter, which writes the cache in place
SCALES_SUFFIX = ".scales"  # the scales of weight NAME are named NAME.scales
PAGE_BYTES = 4096  # large weights begin at a page, so that mapping one does not read parts of others
SMALL_ALIGNMENT_BYTES = 64  # of other weights
MIN_PAGE_ALIGNED_VALUES = 4 * PAGE_BYTES  # aligning smaller weights to pages would waste more space than it helps

# Passes that run after constant folding. onnxscript's full optimizer gives the same and takes fifty times as long.
CLEANUP_PASSES = (
    passes.RemoveUnusedNodesPass(),
    passes.CommonSubexpressionEliminationPass(),
    passes.RemoveUnusedNodesPass(),
    passes.ClearMetadataAndDocStringPass(),  # metadata has file paths of the exporting machine
)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by Gemm: it takes the weight as stored, [out, in], where MatMul would need a transposed copy."""
    shape = (x.shape[0], weight.shape[0])
    return torch.onnx.ops.symbolic("Gemm", (x, weight), {"transB": 1}, dtype=x.dtype, shape=shape)


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    start = position.expand(cache.shape[0])  # TensorScatter wants one start for each KV head
    return torch.onnx.ops.symbolic("TensorScatter", (cache, rows, start), dtype=cache.dtype, shape=cache.shape)


OPS = Ops(linear=_linear, write_rows=_write_rows)


def backend_metadata() -> dict[str, Any]:
    """Return the manifest's `backend`."""
    return {
        "name": "onnx",
        "min_runtime": OLDEST_ONNXRUNTIME,
        "opset": OPSET,
        "onnxruntime": onnxruntime.__version__,
    }


def row_multiples() -> dict[str, int]:
    """Return 2, and 4 on arm64.

    A result must not depend on how many rows are computed with it, to the last bit. For a single row, MatMulNBits has a
    kernel that sums in another order than the kernel for several rows. On arm64 all matrix products have such kernels,
    for one to three rows.
    """
    return {"row_multiple": 2, "row_multiple_arm64": 4}


def graph_specs(pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
    """Return the file name and the inputs and outputs of each graph, by graph name."""
    specs = target_graph(pair.target), drafter_graph(pair.target, pair.drafter)
    return {spec.name: (f"{spec.name}.onnx", spec) for spec in specs}


def supported_scales() -> Scales:
    """Return float32 scales of both signs: MatMulNBits takes scales in the dtype of its activations."""
    return Scales()


def rounded_inputs(x: Tensor, weight: Quantized) -> Tensor:
    """Return inputs as MatMulNBits rounds them at level 4: with a scale for each block of the weight."""
    return rounded_blocks(x, _block_size(weight.numbers.shape[1], Width(weight.bits, weight.group_size)))


def matrix_bytes(shape: tuple[int, ...], width: Width) -> int:
    """Return the bytes of a matrix in a graph's file, with its scales in float32, for each block or row."""
    rows, columns = shape
    if width == FLOAT:
        return 4 * rows * columns
    size = _block_size(columns, width)
    blocks = -(-columns // size)
    parts = rows * blocks * size * width.bits // 8, 4 * rows * (1 if width.group_size is None else blocks)
    page = PAGE_BYTES if rows * columns >= MIN_PAGE_ALIGNED_VALUES else 1
    return sum(-(-part_bytes // page) * page for part_bytes in parts)


def export_memory_bytes(parts: Mapping[str, GraphParts]) -> int:
    """Estimate the peak memory in bytes of an export; 1.6 GB were measured for E2B, 1.8 for E4B, 2.5 for E2B packed."""
    if any(isinstance(read, IntegerReader) for part in parts.values() for read in part.weights.values()):
        return 2_800_000_000
    return 1_900_000_000 if sum(part.stored_bytes for part in parts.values()) > 1 << 28 else 700_000_000


def check_file_size(parts: Mapping[str, GraphParts], max_file_bytes: int) -> None:
    """Check that each weight fits into a file of at most so many bytes; its scales may lie in another.

    Raises:
        InputError: one does not.
    """
    for part in parts.values():
        name, number_bytes = max(part.number_bytes.items(), key=lambda item: item[1])
        if number_bytes > max_file_bytes:
            raise too_large(name, number_bytes, max_file_bytes)


def export_graphs(
    directory: Path,
    pair: Pair,
    parts: Mapping[str, GraphParts],
    limits: Mapping[str, int],
    max_file_bytes: int | None,
    progress: Progress,
) -> ExportedGraphs:
    """Write both graphs and their weights; `Backend.export_graphs` describes the arguments."""
    stored = {
        name: export_graph(directory, pair, name, parts[name], limits, max_file_bytes, progress)
        for name in graph_specs(pair)
    }
    return ExportedGraphs({}, _head(stored["target"], parts["target"], pair.head))


def export_graph(
    directory: Path,
    pair: Pair,
    name: str,
    part: GraphParts,
    limits: Mapping[str, int],
    max_file_bytes: int | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, ir.ExternalTensor]:
    """Write one graph, `NAME.onnx`, and its weights, `NAME.weights`.

    Args:
        directory: an existing directory to write to.
        pair: the target and its drafter.
        name: `target` or `drafter`.
        part: the graph's module and weights.
        limits: maximum size of each varying dimension, from `exporter.graphs.spec.size_limits`.
        max_file_bytes: largest size of each file of weights; None for one file.
        progress: called with what is being written and how many bytes of float32 weights were processed.

    Returns:
        Where each stored weight lies, by name; scales are named `WEIGHT.scales`.
    """
    file, spec = graph_specs(pair)[name]
    progress(f"tracing {name}", 0)
    model = trace_graph(spec, limits, partial(_module, part))
    stored = _write_weights(directory / f"{name}.weights", part, max_file_bytes, progress)
    _attach(model, stored, part)
    ir.save(model, directory / file)
    return stored


def _module(part: GraphParts) -> nn.Module:
    return part.graph(part.model(OPS), True)


def _head(stored: Mapping[str, ir.ExternalTensor], part: GraphParts, name: str) -> dict[str, Any]:
    """Return the manifest entry of the rows of the target's head; a token embedding that it is, is stored once."""
    data, scales, (rows, columns) = stored[name], stored.get(name + SCALES_SUFFIX), part.shapes[name]
    row_bytes = (data.length or 0) // rows
    if scales is None:
        return table_metadata((rows, columns), "float32", [_place(data, rows)], row_bytes)
    bits, group_size = part.widths[name].bits, columns // scales.shape.numpy()[1]
    scales_at = [_place(scales, rows)], "float32"
    return table_metadata((rows, columns), f"uint{bits}", [_place(data, rows)], row_bytes, group_size, scales_at)


def _place(tensor: ir.ExternalTensor, rows: int) -> Part:
    return {"file": str(tensor.location), "offset": tensor.offset or 0, "rows": rows}


def stored_weights(file: Path) -> dict[str, ir.TensorProtocol]:
    """Return the weights and scales of an exported graph by name; each is mapped from its file when it is read."""
    initializers = ir.load(file).graph.initializers
    return {name: v.const_value for name, v in initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}


def differing_weights(parts: Mapping[str, GraphParts], files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return, for each graph, the names of weights that its file does not hold bit for bit, or should not hold."""
    return {name: _differing(files[name], part) for name, part in parts.items()}


def _differing(file: Path, part: GraphParts) -> list[str]:
    stored = stored_weights(file)
    rows = dict.fromkeys(stored, 0)  # compared so far
    differing = set()
    for parameter in part.weights:
        for name, array in _encoded(part, parameter):
            start = rows.setdefault(name, 0)
            rows[name] += len(array)
            actual = stored[name].numpy()[start : rows[name]] if name in stored else None
            if actual is not None and array.shape[1:] == (1,):  # scales of rows, which older versions repeated
                array = np.broadcast_to(array, actual.shape)
            # Bytes are compared because 0 equals -0.
            if actual is None or (array.dtype, array.tobytes()) != (actual.dtype, actual.tobytes()):
                differing.add(name)
    return sorted(differing | {name for name, tensor in stored.items() if rows[name] != tensor.shape.numpy()[0]})


def stored_integers(
    part: GraphParts, file: Path, names: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, IntegerReader]:
    """Return readers of matrices that a graph's file holds; `Backend.stored_integers` describes the arguments."""
    stored = stored_weights(file)
    found = {}
    for name in names:
        numbers, scales = stored[name].numpy(), stored[name + SCALES_SUFFIX].numpy()
        columns, width = part.shapes[name][1], part.widths[name]
        blocks = partial(_integer_blocks, numbers, scales, columns, width)
        groups = Width(width.bits, width.group_size and columns // scales.shape[1])
        found[name] = IntegerReader(blocks, groups, columns)
    return found


def _integer_blocks(numbers: np.ndarray, scales: np.ndarray, columns: int, width: Width) -> Iterator[Quantized]:
    """The inverse of `_encoded`, in blocks of rows."""
    groups = 1 if width.group_size is None else scales.shape[1]
    step = max(1, BLOCK_BYTES // (4 * columns))
    for start in range(0, len(numbers), step):
        rows = numbers[start : start + step].reshape(min(step, len(numbers) - start), -1)
        integers = torch.from_numpy(unpack(rows, f"uint{width.bits}", columns)).to(torch.int8)
        yield Quantized(integers, torch.from_numpy(scales[start : start + step, :groups].copy()), width.bits)


def trace_graph(spec: GraphSpec, limits: Mapping[str, int], build: Callable[[], nn.Module]) -> ir.Model:
    """Trace a module into an ONNX model whose parameters have no values yet.

    Args:
        spec: names and shapes of the graph's inputs and outputs.
        limits: maximum size of each varying dimension.
        build: makes the module, with the operations `OPS`. Its parameters are not allocated.
    """
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), FakeTensorMode(), torch.no_grad():
        inputs, shapes = trace_arguments(spec, limits)
        program = torch.onnx.export(
            build().eval(),
            inputs,
            dynamic_shapes=shapes,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        model = program.model
        for name, initializer in list(model.graph.initializers.items()):
            initializer.const_value = None
            initializer.name = name.partition(".")[2]  # the name in `GraphParts.model`, inside the traced wrapper
        for values, ports in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
            for value, port in zip(values, ports, strict=True):
                value.name, value.shape = port.name, ir.Shape(port.shape)
        onnxscript.optimizer.fold_constants(model)
    for cleanup in CLEANUP_PASSES:
        cleanup(model)
    return model


def _encoded(
    part: GraphParts, parameter: str, progress: Progress = lambda *_: None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a weight as its file holds it: blocks of rows, floats or integers packed for MatMulNBits, then the scales.

    Integers are uint8 [rows, blocks, bytes of a block], scales float32 [rows, blocks], or [rows, 1] for whole rows.
    """
    scales = []
    for block in part.blocks(parameter, progress=progress):
        if isinstance(block, Tensor):
            yield parameter, block.contiguous().numpy()
            continue
        rows, columns = block.numbers.shape
        size = _block_size(columns, Width(block.bits, block.group_size))
        padded = F.pad(block.numbers, (0, -columns % size))
        yield parameter, pack(padded, block.bits).reshape(rows, -1, size * block.bits // 8)
        scales.append(block.scales.contiguous().numpy())
    if scales:
        yield parameter + SCALES_SUFFIX, np.concatenate(scales)


def _block_size(columns: int, width: Width) -> int:
    """Return the number of integers in a block of MatMulNBits.

    It is the group, or, if a row has one scale, the largest size up to 256 that divides the row, else 128. Blocks of
    256 have no kernel for integers of 2 bits.
    """
    if (width.group_size or columns) < columns:
        return width.group_size or columns
    return next((size for size in (256, 128, 64, 32)[width.bits == 2 :] if columns % size == 0), 128)


def _write_weights(
    path: Path, part: GraphParts, max_file_bytes: int | None, progress: Progress
) -> dict[str, ir.ExternalTensor]:
    """Write a graph's weights one after the other, in blocks of rows, and return where each lies, by name."""
    stored: dict[str, ir.ExternalTensor] = {}
    with SplitFile(path, max_file_bytes) as file:
        for parameter in part.weights:
            for name, array in _encoded(part, parameter, progress):
                if (written := stored.get(name)) is None:
                    large = prod(part.shapes[parameter]) >= MIN_PAGE_ALIGNED_VALUES
                    alignment_bytes = PAGE_BYTES if large else SMALL_ALIGNMENT_BYTES
                    file.begin(name, array.nbytes // len(array) * part.shapes[parameter][0], alignment_bytes)
                    start, rows = file.offset, 0
                else:
                    start, rows = written.offset or 0, written.shape.numpy()[0]
                file.write(array)
                stored[name] = ir.ExternalTensor(
                    file.file,
                    start,
                    file.offset - start,
                    ir.DataType.from_numpy(array.dtype),
                    shape=ir.Shape((rows + len(array), *array.shape[1:])),
                    name=name,
                    base_dir=path.parent,
                )
    return stored


def _expanded(model: ir.Model, scales: ir.Value, blocks: int) -> ir.Value:
    """Repeat scales of rows [rows, 1] for the blocks of each, which ONNX Runtime does once, when it loads the graph."""
    assert scales.shape is not None
    sizes = ir.tensor(np.array([scales.shape.numpy()[0], blocks], np.int64), name=f"{scales.name}.sizes")
    shape = ir.Value(name=sizes.name, shape=ir.Shape([2]), type=ir.TensorType(sizes.dtype), const_value=sizes)
    model.graph.initializers.add(shape)
    node = ir.Node("", "Expand", [scales, shape], name=f"{scales.name}.expand")
    node.outputs[0].name = f"{scales.name}.expanded"
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def _attach(model: ir.Model, stored: Mapping[str, ir.ExternalTensor], part: GraphParts) -> None:
    """Give a traced graph its weights, and turn each Gemm whose weight has scales into a MatMulNBits."""
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        if value.const_value is not None:
            continue
        tensor = stored[name]
        value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
        if (scales := stored.get(name + SCALES_SUFFIX)) is None:
            continue
        model.graph.opset_imports["com.microsoft"] = 1
        added = ir.Value(name=scales.name, shape=scales.shape, type=ir.TensorType(scales.dtype), const_value=scales)
        initializers.add(added)
        rows, columns = part.shapes[name]
        _, blocks, block_bytes = tensor.shape.numpy()
        if scales.shape.numpy()[1] < blocks:
            added = _expanded(model, added, blocks)
        bits = part.widths[name].bits
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block_bytes * 8 // bits}
        for node, _ in value.uses():
            assert node.op_type == "Gemm"
            node.op_type, node.domain = "MatMulNBits", "com.microsoft"
            node.attributes.clear()
            # Level 4 rounds inputs to 8 bits and multiplies integers; other levels are many times slower. They are for
            # inputs that the graph has rounded by itself, which another rounding would move.
            level = 1 if f"{name.removesuffix('weight')}input_scale" in part.weights else 4
            for key, number in {**sizes, "accuracy_level": level}.items():
                node.attributes.add(ir.AttrInt64(key, number))
            node.resize_inputs(3)
            node.replace_input_with(2, added)
