"""The ExecuTorch backend: both graphs as methods of one program, lowered to XNNPACK, with the KV cache as inputs."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import ViewCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.passes import MemoryPlanningPass
from executorch.version import __version__
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.export.graph_signature import OutputKind

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader
from exporter.graphs.backend import ExportedGraphs
from exporter.graphs.executorch_ops import Constants
from exporter.graphs.executorch_weights import (
    MIN_BITS,
    SCALES,
    digest,
    head_table,
    held_arrays,
    held_blobs,
    held_digests,
    held_weight,
    module_with_weights,
)
from exporter.graphs.parts import GraphParts
from exporter.graphs.spec import GraphSpec, drafter_graph, target_graph, trace_arguments, without_cache_outputs
from exporter.graphs.split_files import too_large
from exporter.modeling.layers import Ops
from exporter.quantization.activations import rounded_rows
from exporter.quantization.numbers import Quantized, Scales
from exporter.quantization.widths import FLOAT, Width
from runtime_ref.manifest import Progress
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet
from runtime_ref.tables import unpack

PROGRAM = "model.pte"


def backend_metadata() -> dict[str, Any]:
    """Return the manifest's `backend`, without `delegation`, which `export_graphs` adds."""
    return {"name": "executorch", "min_runtime": __version__, "executorch": __version__, "delegate": "xnnpack"}


def graph_specs(pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
    """Return the file name and the inputs and outputs of each graph, by graph name; both are methods of one program."""
    specs = target_graph(pair.target), drafter_graph(pair.target, pair.drafter)
    return {spec.name: (PROGRAM, without_cache_outputs(spec)) for spec in specs}


def row_multiples() -> dict[str, int]:
    """Return 1: XNNPACK computes a row in the same way, whatever the number of rows."""
    return {"row_multiple": 1}


def supported_scales() -> Scales:
    """Return what XNNPACK takes for scales of groups: bfloat16, never negative."""
    return SCALES


def rounded_inputs(x: Tensor, weight: Quantized) -> Tensor:
    """Return inputs as XNNPACK rounds them: with a scale for each row."""
    return rounded_rows(x)


def matrix_bytes(shape: tuple[int, ...], width: Width) -> int:
    """Return the bytes of a matrix in a program, with its scales: float32 for 8 bits, else bfloat16."""
    rows, columns = shape
    if width == FLOAT:
        return 4 * rows * columns
    groups = columns // (width.group_size or columns)
    return rows * (-(-columns * max(width.bits, MIN_BITS) // 8) + groups * (4 if width.bits == 8 else 2))


def export_memory_bytes(parts: Mapping[str, GraphParts]) -> int:
    """Estimate the peak memory in bytes of an export; 15.2 GB were measured for E4B's 4.6 billion values in 4 bits.

    A quantized value is held as one byte, packed, and packed once more while the program is written. A float32 value is
    held three times.
    """
    quantized_values = sum(part.num_quantized_values for part in parts.values())
    float_bytes = sum(
        4 * prod(part.shapes[name]) for part in parts.values() for name in part.weights if name not in part.widths
    )
    return 700_000_000 + quantized_values * 32 // 10 + 3 * float_bytes


def check_file_size(parts: Mapping[str, GraphParts], max_file_bytes: int) -> None:
    """Check that the program, which is one file, has at most so many bytes, as far as its weights tell.

    Raises:
        InputError: it is larger.
    """
    number_bytes = sum(sum(part.number_bytes.values()) for part in parts.values())
    if number_bytes > max_file_bytes:
        raise too_large(PROGRAM, number_bytes, max_file_bytes)


def export_graphs(
    directory: Path,
    pair: Pair,
    parts: Mapping[str, GraphParts],
    limits: Mapping[str, int],
    max_file_bytes: int | None,
    progress: Progress,
) -> ExportedGraphs:
    """Write the program, weights included; `Backend.export_graphs` describes the arguments.

    The program is one file, whatever its size.
    The returned metadata, `delegation`, counts the operations and weight bytes that XNNPACK took, for each method.
    """
    with quiet(*EXECUTORCH_LOGGERS), torch.no_grad():
        programs = {}
        for name, (_, spec) in graph_specs(pair).items():
            progress(f"tracing {name}", 0)
            programs[name] = trace_graph(spec, limits, functools.partial(module_with_weights, parts[name], progress))
        progress("lowering", 0)
        edge = delegate(programs)
        delegation = {name: _delegation(edge.exported_program(name)) for name in parts}
        progress("writing", 0)
        _drop_delegated_weights(programs, edge)
        with (directory / PROGRAM).open("wb") as stream:
            emit(edge).write_to_file(stream)
    metadata: dict[str, Any] = {"delegation": delegation}
    if pair.calibrated is not None:
        stored = {name: held_arrays(held_weight(parts["target"], name)) for name in pair.calibrated.matrices}
        metadata["calibrated"] = {name: [digest(a.tobytes()).hex() for a in arrays] for name, arrays in stored.items()}
    return ExportedGraphs(metadata, head_table(directory / PROGRAM, parts["target"], pair.head))


def trace_graph(spec: GraphSpec, limits: Mapping[str, int], build: Callable[[Ops], nn.Module]) -> ExportedProgram:
    """Trace a module into a program for `delegate`.

    Args:
        spec: names and shapes of the graph's inputs and outputs.
        limits: maximum size of each varying dimension.
        build: makes the module, with its weights, of this backend's operations.
    """
    constants = Constants()
    module = build(constants.ops()).eval()
    constants.register(module)
    inputs, shapes = trace_arguments(spec, limits)
    return export(module, inputs, dynamic_shapes=shapes, strict=False)


def delegate(programs: Mapping[str, ExportedProgram]) -> EdgeProgramManager:
    """Lower traced programs: delegate to XNNPACK what it supports, and let cache writes happen in place.

    Args:
        programs: traced programs, by the name of the method that each becomes.
    """
    partitioners = {name: [XnnpackPartitioner(configs=_CONFIGS)] for name in programs}
    # Its checks after each pass take a sixth of the time, and what they would find parity finds.
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge_transform_and_lower(dict(programs), partitioner=partitioners, compile_config=config)
    _write_in_place(edge)
    return edge


def emit(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """Turn lowered methods into one program that ExecuTorch's runtime can load; it needs no custom operations."""
    # No memory is planned for inputs: the runtime then uses the host's pointers, and never copies the cache.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))


def differing_weights(parts: Mapping[str, GraphParts], files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return, for each graph, the names of weights that the program does not hold bit for bit.

    A program has no names for its weights, so they are compared by digests of their content.
    """
    stored = {file: held_digests(file) for file in set(files.values())}
    return {
        name: [
            weight
            for weight in part.weights
            if any(
                digest(array.tobytes()) not in stored[files[name]] for array in held_arrays(held_weight(part, weight))
            )
        ]
        for name, part in parts.items()
    }


def stored_integers(
    part: GraphParts, file: Path, names: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, IntegerReader]:
    """Return readers of matrices that the program holds; `Backend.stored_integers` describes the arguments.

    A program has no names for its weights; the metadata has digests of these under `calibrated`.
    """
    blobs, found = {digest(blob): blob for blob in held_blobs(file)}, {}
    for name in names:
        numbers, scales = (blobs[bytes.fromhex(digest)] for digest in metadata["calibrated"][name])
        (rows, columns), bits = part.shapes[name], part.widths[name].bits
        row_bytes = -(-columns * bits // 8)
        packed = np.frombuffer(numbers, np.uint8, rows * row_bytes).reshape(rows, row_bytes)
        integers = torch.from_numpy(unpack(packed, f"uint{bits}", columns)).to(torch.int8)
        width = part.widths[name].group_size
        groups = 1 if width is None else len(scales) // (2 * rows)
        values = torch.frombuffer(bytearray(scales), dtype=torch.bfloat16)[: rows * groups].float().view(rows, groups)
        blocks = functools.partial(_one_block, Quantized(integers, values, bits))
        found[name] = IntegerReader(blocks, Width(bits, width and columns // groups), columns)
    return found


def _one_block(matrix: Quantized) -> Iterator[Quantized]:
    yield matrix


class _ViewCopy(ViewCopyConfig):
    """Keep views of whole weights out of XNNPACK, which would copy them; outside, a view costs nothing."""

    def check_constraints(self, node: Any, ep: ExportedProgram) -> bool:
        return node.args[0].op != "placeholder" and super().check_constraints(node, ep)


_CONFIGS = [_ViewCopy if config is ViewCopyConfig else config for config in ALL_PARTITIONER_CONFIGS]


def _write_in_place(edge: EdgeProgramManager) -> None:
    """Let the program write into its cache inputs.

    Tracing turned each write into a new tensor, a copy of it back to the input, and an output. Executed like that, the
    cache would be copied twice in each call.
    """
    for name in edge.methods:
        program = edge.exported_program(name)
        graph, specs = program.graph_module.graph, program.graph_signature.output_specs
        writes = [n for n in graph.nodes if n.target is exir_ops.edge.aten.index_put.default]
        # All outputs but the user's are dropped below: each must be the result of one of these writes.
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
    """Release weights that delegates already hold packed, to free memory for writing; only their shapes are kept."""
    programs.clear()
    for name in edge.methods:
        for module in _delegates(edge.exported_program(name)):
            state = module.original_module.state_dict
            for weight, tensor in state.items():
                shape_only = tensor.new_zeros(()).expand(tensor.shape)
                state[weight] = nn.Parameter(shape_only, False) if isinstance(tensor, nn.Parameter) else shape_only


def _delegation(program: ExportedProgram) -> dict[str, Any]:
    """Count operations and weight bytes that XNNPACK took, and those that stayed with the portable kernels."""
    delegates = _delegates(program)
    portable = Counter(_operation_name(node) for node in program.graph_module.graph.nodes if _is_operation(node))
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
    """Return whether a node computes; views, allocations, tuple elements, sizes and calls of delegates do not."""
    return hasattr(node.target, "_schema") and not any(
        word in str(node.target) for word in ("executorch_prim", "sym_size")
    )


def _operation_name(node: Any) -> str:
    return str(node.target._schema.name).partition("::")[2]


def _parameter_bytes(program: ExportedProgram) -> int:
    return sum(program.state_dict[name].nbytes for name in set(program.graph_signature.inputs_to_parameters.values()))
