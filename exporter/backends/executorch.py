"""ExecuTorch: both graphs as methods of one program, lowered to XNNPACK, over a cache that the host passes in."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

from exporter.backends.executorch_ops import Constants
from exporter.checkpoint import Weights, load_module
from exporter.graphs import (
    DrafterGraph,
    GraphSpec,
    TargetGraph,
    drafter_graph,
    target_graph,
    trace_arguments,
    without_cache_outputs,
)
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target
from exporter.pair import Pair
from runtime_ref.manifest import Progress
from runtime_ref.quiet import EXECUTORCH, quiet

PROGRAM = "model.pte"


def runtime() -> dict[str, Any]:
    """What the manifest says of the backend."""
    return {"name": "executorch", "executorch": __version__, "delegate": "xnnpack"}


def graph_specs(pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
    """File, and inputs and outputs, of each graph; both are methods of one program."""
    specs = target_graph(pair.target), drafter_graph(pair.target, pair.drafter)
    return {spec.name: (PROGRAM, without_cache_outputs(spec)) for spec in specs}


def export_graphs(directory: Path, pair: Pair, limits: Mapping[str, int], progress: Progress) -> dict[str, Any]:
    """Write the program, weights included; returns how much of it XNNPACK took."""
    weights = _counted(pair.target_weights, progress)
    # Look-ups of both graphs share one table: one tensor here becomes one in the program.
    weights["embed_tokens.weight"] = functools.cache(weights["embed_tokens.weight"])
    shared = {"target_embed_tokens.weight": weights["embed_tokens.weight"]}
    drafter_weights = _counted(pair.drafter_weights, progress) | shared

    def target(ops: Ops) -> nn.Module:
        return TargetGraph(load_module(lambda: Target(pair.target, ops), weights), cache_outputs=False)

    def drafter(ops: Ops) -> nn.Module:
        module = load_module(lambda: Drafter(pair.drafter, pair.two_stage, ops), drafter_weights)
        return DrafterGraph(module, pair.shared_kv)

    with quiet(*EXECUTORCH), torch.no_grad():
        programs = {}
        for (name, (_, spec)), build in zip(graph_specs(pair).items(), (target, drafter), strict=True):
            progress(f"tracing {name}", 0)
            programs[name] = trace(spec, limits, build)
        progress("lowering", 0)
        lowered = lower(programs)
        progress("writing", 0)
        with (directory / PROGRAM).open("wb") as stream:
            lowered.write_to_file(stream)
        return {"delegation": {name: _delegation(lowered.exported_program(name)) for name in programs}}


def trace(spec: GraphSpec, limits: Mapping[str, int], build: Callable[[Ops], nn.Module]) -> ExportedProgram:
    """Trace the module that `build` makes of this backend's operations."""
    constants = Constants()
    module = build(constants.ops()).eval()
    constants.register(module)
    inputs, shapes = trace_arguments(spec, limits)
    return export(module, inputs, dynamic_shapes=shapes, strict=False)


def lower(programs: dict[str, ExportedProgram]) -> ExecutorchProgramManager:
    """Lower traced methods to one program that runs on the stock runtime with XNNPACK."""
    partitioners = {name: [XnnpackPartitioner(configs=_CONFIGS)] for name in programs}
    edge = to_edge_transform_and_lower(programs, partitioner=partitioners)
    _write_in_place(edge)
    # Inputs are not planned: the runtime then takes the host's pointers, and the cache is never copied.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))


def differing_weights(graphs: Mapping[str, tuple[Path, Weights]]) -> dict[str, list[str]]:
    """Names of weights that a program does not hold bit for bit. It stores them by content, without their names."""
    stored = {file: _stored_digests(file) for file in {file for file, _ in graphs.values()}}
    return {
        name: [n for n, read in weights.items() if _digest(read().contiguous().numpy().tobytes()) not in stored[file]]
        for name, (file, weights) in graphs.items()
    }


def _stored_digests(file: Path) -> set[bytes]:
    with quiet(*EXECUTORCH):
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


def _counted(weights: Weights, progress: Progress) -> dict[str, Any]:
    """The same readers, telling of what they read."""

    def read(name: str) -> Tensor:
        tensor = weights[name]()
        progress(name, tensor.nbytes)
        return tensor

    return {name: functools.partial(read, name) for name in weights}


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


def _delegation(program: ExportedProgram) -> dict[str, Any]:
    """Operations and weight bytes that XNNPACK took, and those that stayed with the portable kernels."""
    module = program.graph_module
    delegates = [getattr(module, n.args[0].target) for n in module.graph.nodes if n.target is _CALL_DELEGATE]
    portable = Counter(_name(node) for node in module.graph.nodes if _is_operation(node))
    return {
        "delegates": len(delegates),
        "delegated_ops": sum(_is_operation(node) for d in delegates for node in d.original_module.graph.nodes),
        "portable_ops": sum(portable.values()),
        "portable_ops_by_name": dict(sorted(portable.items())),
        "delegated_weight_bytes": sum(_parameter_bytes(d.original_module) for d in delegates),
        "portable_weight_bytes": _parameter_bytes(program),
    }


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
