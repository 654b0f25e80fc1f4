"""ExecuTorch: both graphs as methods of one program, lowered to XNNPACK, over a cache that the host passes in."""

import functools
import hashlib
import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import ViewCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.passes import MemoryPlanningPass
from executorch.version import __version__
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.export.graph_signature import OutputKind
from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor

from exporter.backends.executorch_ops import Constants
from exporter.checkpoint import load_module
from exporter.graphs import GraphSpec, drafter_graph, target_graph, trace_arguments, without_cache_outputs
from exporter.modeling.layers import Ops
from exporter.pair import Pair
from exporter.parts import GraphParts
from exporter.quantize import Quantized, Scales, pack
from exporter.tables import EMBEDDING, Exported, table_facts
from runtime_ref.manifest import Progress
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet

PROGRAM = "model.pte"


def runtime() -> dict[str, Any]:
    """What the manifest says of the backend."""
    return {"name": "executorch", "executorch": __version__, "delegate": "xnnpack"}


def graph_specs(pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
    """File, and inputs and outputs, of each graph; both are methods of one program."""
    specs = target_graph(pair.target), drafter_graph(pair.target, pair.drafter)
    return {spec.name: (PROGRAM, without_cache_outputs(spec)) for spec in specs}


def row_multiples() -> dict[str, int]:
    """XNNPACK computes every row alike, alone or not."""
    return {"row_multiple": 1}


def scales() -> Scales:
    """XNNPACK's of groups: it refuses negative ones."""
    return Scales(torch.bfloat16, negative=False)


def memory(parts: Mapping[str, GraphParts]) -> int:
    """Bytes that an export takes, about: 15.2 GB were measured for the 4.6 billion numbers of E4B in 4 bits.

    Those are held in one byte each, packed, and packed once more while they are written; float32 three times.
    """
    few = sum(part.few_bits for part in parts.values())
    wide = sum(part.stored_bytes for part in parts.values() if not part.widths)
    return 700_000_000 + few * 32 // 10 + 3 * wide


def export_graphs(
    directory: Path, pair: Pair, parts: Mapping[str, GraphParts], limits: Mapping[str, int], progress: Progress
) -> Exported:
    """Write the program, weights included; the backend's facts are how much of it XNNPACK took."""
    with quiet(*EXECUTORCH_LOGGERS), torch.no_grad():
        programs = {}
        for name, (_, spec) in graph_specs(pair).items():
            progress(f"tracing {name}", 0)
            programs[name] = trace(spec, limits, functools.partial(_module, parts[name], progress))
        progress("lowering", 0)
        edge = delegate(programs)
        facts = {name: _delegation(edge.exported_program(name)) for name in parts}
        progress("writing", 0)
        _drop_delegated_weights(programs, edge)
        with (directory / PROGRAM).open("wb") as stream:
            emit(edge).write_to_file(stream)
    return Exported({"delegation": facts}, _embedding(directory / PROGRAM, parts["target"]))


def _module(part: GraphParts, progress: Progress, ops: Ops) -> nn.Module:
    """A graph with its weights, those of few bits as torchao represents them, which XNNPACK's partitioner knows."""
    weights = {name: functools.partial(_weight, part, name, progress) for name in part.weights}
    return part.graph(load_module(lambda: part.model(ops), weights), False)


def _weight(part: GraphParts, name: str, progress: Progress) -> Tensor:
    found = part.whole(name, scales(), progress)
    if isinstance(found, Tensor):
        return found
    return IntxUnpackedToInt8Tensor(
        found.numbers,
        found.scales,
        torch.zeros_like(found.scales, dtype=torch.int8),
        getattr(torch, f"int{found.bits}"),
        (1, found.group),
        torch.float32,
        "int8_asym_per_token",
    )


def _embedding(file: Path, part: GraphParts) -> dict[str, Any]:
    """Where the token embedding lies: a program holds the head's weight row by row, so it serves look-ups as well."""
    found = part.whole(EMBEDDING, scales())
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as program:
        places = [_place(program, array) for array in _stored(found)]
    rows, columns = part.shapes[EMBEDDING]
    if isinstance(found, Tensor):
        return table_facts((rows, columns), "float32", (file.name, places[0]), 4 * columns)
    scale = (file.name, places[1], "float32" if found.bits == 8 else "bfloat16")
    encoding = "int8" if found.bits == 8 else f"uint{found.bits}"
    row_bytes = -(-columns * found.bits // 8)
    return table_facts((rows, columns), encoding, (file.name, places[0]), row_bytes, found.group, scale)


def _place(program: mmap.mmap, array: np.ndarray) -> int:
    """Where a program holds an array."""
    content = array.tobytes()
    # By the most varied of some pieces: rows of zeros are everywhere.
    starts = range(0, max(1, len(content) - 64), max(1, len(content) // 256))
    piece = max(starts, key=lambda start: len(set(content[start : start + 64])))
    at = program.find(content[piece : piece + 64])
    while at >= 0:
        with memoryview(program) as view, view[max(0, at - piece) : max(0, at - piece) + len(content)] as found:
            if found == content:
                return at - piece
        at = program.find(content[piece : piece + 64], at + 1)
    raise AssertionError("the program does not hold the embedding as it was given")


def _stored(weight: Tensor | Quantized) -> list[np.ndarray]:
    """A weight as XNNPACK's part of a program holds it: floats, or integers and their scales."""
    if isinstance(weight, Tensor):
        return [weight.contiguous().numpy()]
    numbers = weight.numbers.numpy() if weight.bits == 8 else pack(weight.numbers, weight.bits)
    if weight.bits == 8:
        return [numbers, weight.scales.numpy()]
    return [numbers, weight.scales.to(torch.bfloat16).view(torch.int16).numpy()]


def trace(spec: GraphSpec, limits: Mapping[str, int], build: Callable[[Ops], nn.Module]) -> ExportedProgram:
    """Trace the module that `build` makes of this backend's operations."""
    constants = Constants()
    module = build(constants.ops()).eval()
    constants.register(module)
    inputs, shapes = trace_arguments(spec, limits)
    return export(module, inputs, dynamic_shapes=shapes, strict=False)


def delegate(programs: Mapping[str, ExportedProgram]) -> EdgeProgramManager:
    """Give XNNPACK what it takes of traced methods, and let the rest write to the cache in place."""
    partitioners = {name: [XnnpackPartitioner(configs=_CONFIGS)] for name in programs}
    edge = to_edge_transform_and_lower(dict(programs), partitioner=partitioners)
    _write_in_place(edge)
    return edge


def emit(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """One program of delegated methods, for the stock runtime."""
    # Inputs are not planned: the runtime then takes the host's pointers, and the cache is never copied.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))


def differing_weights(parts: Mapping[str, GraphParts], files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Names of weights that a program does not hold bit for bit. It stores them by content, without their names."""
    stored = {file: _stored_digests(file) for file in set(files.values())}
    return {
        name: [
            weight
            for weight in part.weights
            if any(_digest(a.tobytes()) not in stored[files[name]] for a in _stored(part.whole(weight, scales())))
        ]
        for name, part in parts.items()
    }


def _stored_digests(file: Path) -> set[bytes]:
    with quiet(*EXECUTORCH_LOGGERS):
        program = deserialize_pte_binary(file.read_bytes())
    blobs = [buffer.storage for buffer in program.program.constant_buffer]
    blobs += program.named_data.buffers if program.named_data else []
    return {_digest(blob) for blob in blobs}


def _digest(blob: bytes) -> bytes:
    """Of the bytes and the zeros that fill them up to the alignment of constants, which a program may have or not."""
    return hashlib.sha256(blob + bytes(-len(blob) % 16)).digest()


class _ViewCopy(ViewCopyConfig):
    """XNNPACK copies what it reshapes; a whole weight is better viewed outside, which is free."""

    def check_constraints(self, node: Any, ep: ExportedProgram) -> bool:
        return node.args[0].op != "placeholder" and super().check_constraints(node, ep)


_CONFIGS = [_ViewCopy if config is ViewCopyConfig else config for config in ALL_PARTITIONER_CONFIGS]


def _write_in_place(edge: EdgeProgramManager) -> None:
    """Write to the cache inputs themselves.

    Tracing made each write a new tensor, a copy of it back to the input, and an output. The runtime would copy the
    cache twice a call and return it.
    """
    for name in edge.methods:
        program = edge.exported_program(name)
        graph, specs = program.graph_module.graph, program.graph_signature.output_specs
        writes = [n for n in graph.nodes if n.target is exir_ops.edge.aten.index_put.default]
        # Outputs that stand for anything else than these writes would be lost below.
        assert len(writes) == sum(spec.kind is OutputKind.USER_INPUT_MUTATION for spec in specs)
        assert all(node.args[0].op == "placeholder" for node in writes)
        for node in writes:
            node.target = exir_ops.edge.aten.index_put_.default
        output = graph.output_node()
        kept = [i for i, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT]
        output.args = (tuple(output.args[0][i] for i in kept),)
        specs[:] = [specs[i] for i in kept]
        graph.eliminate_dead_code()
        program.graph_module.recompile()


def _drop_delegated_weights(programs: dict[str, ExportedProgram], edge: EdgeProgramManager) -> None:
    """Let go of weights that delegates hold packed by now: their shapes are enough, and writing takes memory too."""
    programs.clear()
    for name in edge.methods:
        for module in _delegates(edge.exported_program(name)):
            state = module.original_module.state_dict
            for weight, tensor in state.items():
                shape_only = tensor.new_zeros(()).expand(tensor.shape)
                state[weight] = nn.Parameter(shape_only, False) if isinstance(tensor, nn.Parameter) else shape_only


def _delegation(program: ExportedProgram) -> dict[str, Any]:
    """Operations and weight bytes that XNNPACK took, and those that stayed with the portable kernels."""
    delegates = _delegates(program)
    portable = Counter(_name(node) for node in program.graph_module.graph.nodes if _is_operation(node))
    return {
        "delegates": len(delegates),
        "delegated_ops": sum(_is_operation(node) for d in delegates for node in d.original_module.graph.nodes),
        "portable_ops": sum(portable.values()),
        "portable_ops_by_name": dict(sorted(portable.items())),
        "delegated_weight_bytes": sum(_parameter_bytes(d.original_module) for d in delegates),
        "portable_weight_bytes": _parameter_bytes(program),
    }


def _delegates(program: ExportedProgram) -> list[Any]:
    module = program.graph_module
    return [getattr(module, n.args[0].target) for n in module.graph.nodes if n.target is _CALL_DELEGATE]


_CALL_DELEGATE = torch.ops.higher_order.executorch_call_delegate


def _is_operation(node: Any) -> bool:
    """Whether a node computes: not a view, an allocation, an element of a tuple, a size or a delegate's call."""
    return hasattr(node.target, "_schema") and not any(
        word in str(node.target) for word in ("executorch_prim", "sym_size")
    )


def _name(node: Any) -> str:
    return str(node.target._schema.name).partition("::")[2]


def _parameter_bytes(program: ExportedProgram) -> int:
    return sum(program.state_dict[name].nbytes for name in set(program.graph_signature.inputs_to_parameters.values()))
