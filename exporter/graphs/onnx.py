"""ONNX Runtime: trace each graph without weights, then attach them from files laid out for memory mapping."""

from collections.abc import Callable, Iterator, Mapping
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
from exporter.graphs.backend import Exported
from exporter.graphs.parts import GraphParts
from exporter.graphs.spec import GraphSpec, drafter_graph, target_graph, trace_arguments
from exporter.graphs.tables import EMBEDDING, table_facts
from exporter.modeling.layers import Ops
from exporter.quantization.numbers import Quantized, Scales, pack
from runtime_ref.manifest import Progress
from runtime_ref.quiet import quiet

OPSET = 24  # the first with TensorScatter, which writes the cache in place
ALIGNMENT = 4096  # a page, so that a table is mapped without its neighbours
_SMALL = 4 * ALIGNMENT  # numbers: below this, padding to pages would cost more than it gives

# After constant folding; onnxscript's full optimizer finds the same and takes fifty times as long.
TIDY = (
    passes.RemoveUnusedNodesPass(),
    passes.CommonSubexpressionEliminationPass(),
    passes.RemoveUnusedNodesPass(),
    passes.ClearMetadataAndDocStringPass(),  # traces carry paths of the machine that exported
)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Gemm takes the weight as the checkpoint stores it, [out, in]; MatMul would need a transposed copy."""
    shape = (x.shape[0], weight.shape[0])
    return torch.onnx.ops.symbolic("Gemm", (x, weight), {"transB": 1}, dtype=x.dtype, shape=shape)


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    start = position.expand(cache.shape[0])
    return torch.onnx.ops.symbolic("TensorScatter", (cache, rows, start), dtype=cache.dtype, shape=cache.shape)


OPS = Ops(linear=_linear, write_rows=_write_rows)


def runtime() -> dict[str, Any]:
    """What the manifest says of the backend."""
    return {"name": "onnx", "opset": OPSET, "onnxruntime": onnxruntime.__version__}


def row_multiples() -> dict[str, int]:
    """MatMulNBits has a kernel of its own for one row, which sums in another order than those for several.

    On ARM so do all products, for up to three rows.
    """
    return {"row_multiple": 2, "row_multiple_arm64": 4}


def graph_specs(pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
    """File, and inputs and outputs, of each graph."""
    return {
        s.name: (f"{s.name}.onnx", s) for s in (target_graph(pair.target), drafter_graph(pair.target, pair.drafter))
    }


def scales() -> Scales:
    """MatMulNBits takes any, in the dtype of the activations."""
    return Scales()


def memory(parts: Mapping[str, GraphParts]) -> int:
    """Bytes that an export takes, about: little for small pairs, and 1.6 and 1.8 GB were measured for E2B and E4B."""
    return 1_900_000_000 if sum(part.stored_bytes for part in parts.values()) > 1 << 28 else 700_000_000


def export_graphs(
    directory: Path, pair: Pair, parts: Mapping[str, GraphParts], limits: Mapping[str, int], progress: Progress
) -> Exported:
    """Write both graphs into a directory."""
    stored = {name: export_graph(directory, pair, name, parts[name], limits, progress) for name in graph_specs(pair)}
    return Exported({}, _embedding(stored["target"], parts["target"]))


def export_graph(
    directory: Path,
    pair: Pair,
    name: str,
    part: GraphParts,
    limits: Mapping[str, int],
    progress: Progress = lambda *_: None,
) -> dict[str, ir.ExternalTensor]:
    """Write one graph, `NAME.onnx`, and its weights, `NAME.weights`. Returns where each weight lies."""
    file, spec = graph_specs(pair)[name]
    progress(f"tracing {name}", 0)
    model = trace(spec, limits, partial(_module, part))
    stored = _write_weights(directory / f"{name}.weights", part, progress)
    _attach(model, stored, part)
    ir.save(model, directory / file)
    return stored


def _module(part: GraphParts) -> nn.Module:
    return part.graph(part.model(OPS), True)


def _embedding(stored: Mapping[str, ir.ExternalTensor], part: GraphParts) -> dict[str, Any]:
    """Where the token embedding lies: the head's weight is the look-up table as well."""
    data, scales, (rows, columns) = stored[EMBEDDING], stored.get(EMBEDDING + SCALES), part.shapes[EMBEDDING]
    place = (str(data.location), data.offset or 0)
    row_bytes = (data.length or 0) // rows
    if scales is None:
        return table_facts((rows, columns), "float32", place, row_bytes)
    bits, block_bytes = part.widths[EMBEDDING].bits, data.shape.numpy()[2]
    group = block_bytes * 8 // bits
    scales_at = (str(scales.location), scales.offset or 0, "float32")
    return table_facts((rows, columns), f"uint{bits}", place, row_bytes, group, scales_at)


def stored_weights(file: Path) -> dict[str, ir.TensorProtocol]:
    """Weights of an exported graph by parameter name, mapped from their files when they are read."""
    initializers = ir.load(file).graph.initializers
    return {name: v.const_value for name, v in initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}


def differing_weights(parts: Mapping[str, GraphParts], files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Names of weights that each graph does not hold bit for bit, or should not hold."""
    return {name: _differing(files[name], part) for name, part in parts.items()}


def _differing(file: Path, part: GraphParts) -> list[str]:
    stored = stored_weights(file)
    rows = dict.fromkeys(stored, 0)
    differing = set()
    for parameter in part.weights:
        for name, array in _encoded(part, parameter):
            start = rows.setdefault(name, 0)
            rows[name] += len(array)
            theirs = stored[name].numpy()[start : rows[name]] if name in stored else None
            # Bytes, because 0 equals -0.
            if theirs is None or (array.dtype, array.tobytes()) != (theirs.dtype, theirs.tobytes()):
                differing.add(name)
    return sorted(differing | {name for name, tensor in stored.items() if rows[name] != tensor.shape.numpy()[0]})


def trace(spec: GraphSpec, limits: Mapping[str, int], build: Callable[[], nn.Module]) -> ir.Model:
    """Trace the module that `build` makes; the initializers that are its parameters have no values yet."""
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
            initializer.name = name.partition(".")[2]  # without the wrapper that was traced
        for values, ports in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
            for value, port in zip(values, ports, strict=True):
                value.name, value.shape = port.name, ir.Shape(port.shape)
        onnxscript.optimizer.fold_constants(model)
    for tidy in TIDY:
        tidy(model)
    return model


SCALES = ".scales"  # after the name of a weight, that of its scales


def _encoded(
    part: GraphParts, parameter: str, progress: Progress = lambda *_: None
) -> Iterator[tuple[str, np.ndarray]]:
    """A weight as its file holds it, in blocks of rows: floats, or integers packed for MatMulNBits, then the scales."""
    scales = []
    for block in part.blocks(parameter, progress=progress):
        if isinstance(block, Tensor):
            yield parameter, block.contiguous().numpy()
            continue
        rows, columns = block.numbers.shape
        size = _block_size(block)
        padded = F.pad(block.numbers, (0, -columns % size))
        yield parameter, pack(padded, block.bits).reshape(rows, -1, size * block.bits // 8)
        # Where whole rows share a scale, each of their blocks has it.
        scales.append(block.scales.expand(-1, padded.shape[1] // size).contiguous().numpy())
    if scales:
        yield parameter + SCALES, np.concatenate(scales)


def _block_size(weight: Quantized) -> int:
    """Numbers in a block of MatMulNBits: a group, or for rows with one scale the largest that divides them."""
    columns = weight.numbers.shape[1]
    if weight.group < columns:
        return weight.group
    return next((size for size in (256, 128, 64, 32) if columns % size == 0), 128)


def _write_weights(file: Path, part: GraphParts, progress: Progress) -> dict[str, ir.ExternalTensor]:
    """Write a graph's weights one after the other, a few rows at a time, and return where each lies."""
    stored: dict[str, ir.ExternalTensor] = {}
    with file.open("wb") as stream:
        for parameter in part.weights:
            for name, array in _encoded(part, parameter, progress):
                if (written := stored.get(name)) is None:
                    large = prod(part.shapes[parameter]) >= _SMALL
                    stream.write(b"\0" * (-stream.tell() % (ALIGNMENT if large else 64)))
                    start, rows = stream.tell(), 0
                else:
                    start, rows = written.offset or 0, written.shape.numpy()[0]
                stream.write(array.data)  # tofile would hide why a write failed
                stored[name] = ir.ExternalTensor(
                    file.name,
                    start,
                    stream.tell() - start,
                    ir.DataType.from_numpy(array.dtype),
                    shape=ir.Shape((rows + len(array), *array.shape[1:])),
                    name=name,
                    base_dir=file.parent,
                )
    return stored


def _attach(model: ir.Model, stored: Mapping[str, ir.ExternalTensor], part: GraphParts) -> None:
    """Give a traced graph its weights; a Gemm whose weight has scales becomes a MatMulNBits."""
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        if value.const_value is not None:
            continue
        tensor = stored[name]
        value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
        if (scales := stored.get(name + SCALES)) is None:
            continue
        model.graph.opset_imports["com.microsoft"] = 1
        added = ir.Value(name=scales.name, shape=scales.shape, type=ir.TensorType(scales.dtype), const_value=scales)
        initializers.add(added)
        rows, columns = part.shapes[name]
        _, _, block_bytes = tensor.shape.numpy()
        bits = part.widths[name].bits
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block_bytes * 8 // bits}
        for node, _ in value.uses():
            assert node.op_type == "Gemm"
            node.op_type, node.domain = "MatMulNBits", "com.microsoft"
            node.attributes.clear()
            # Level 4 multiplies integers; with others the kernels for few bits take many times as long.
            for key, number in {**sizes, "accuracy_level": 4}.items():
                node.attributes.add(ir.AttrInt64(key, number))
            node.resize_inputs(3)
            node.replace_input_with(2, added)
