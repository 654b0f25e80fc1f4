"""ONNX Runtime: trace each graph without weights, then attach them from files laid out for memory mapping."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from exporter.checkpoint import Weights
from exporter.graphs import DrafterGraph, GraphSpec, TargetGraph, drafter_graph, target_graph, trace_arguments
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target
from exporter.pair import Pair
from runtime_ref.manifest import Progress
from runtime_ref.quiet import quiet

OPSET = 24  # the first with TensorScatter, which writes the cache in place
ALIGNMENT = 4096  # a page, so that a table is mapped without its neighbours
_SMALL = 16 * ALIGNMENT  # below this, padding to pages would cost more than it gives

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


OPS = Ops(linear=_linear, tied_logits=_linear, write_rows=_write_rows)


def runtime() -> dict[str, Any]:
    """What the manifest says of the backend."""
    return {"name": "onnx", "opset": OPSET, "onnxruntime": onnxruntime.__version__}


def graph_specs(pair: Pair) -> dict[str, tuple[str, GraphSpec]]:
    """File, and inputs and outputs, of each graph."""
    return {
        s.name: (f"{s.name}.onnx", s) for s in (target_graph(pair.target), drafter_graph(pair.target, pair.drafter))
    }


def export_graphs(directory: Path, pair: Pair, limits: Mapping[str, int], progress: Progress) -> dict[str, Any]:
    """Write both graphs, `NAME.onnx`, and their weights, `NAME.weights`, into a directory; returns no further facts."""
    progress("tracing", 0)
    (_, target), (_, drafter) = graph_specs(pair).values()
    models = {
        "target": trace(target, limits, lambda: TargetGraph(Target(pair.target, OPS))),
        "drafter": trace(
            drafter, limits, lambda: DrafterGraph(Drafter(pair.drafter, pair.two_stage, OPS), pair.shared_kv)
        ),
    }
    weights = {"target": _write_weights(directory / "target.weights", pair.target_weights, {}, progress)}
    # Both graphs look tokens up in one table; it lies in the target's file.
    known = {"target_embed_tokens.weight": weights["target"]["embed_tokens.weight"]}
    weights["drafter"] = _write_weights(directory / "drafter.weights", pair.drafter_weights, known, progress)
    for name, model in models.items():
        for parameter, initializer in model.graph.initializers.items():
            if initializer.const_value is None:
                initializer.const_value = weights[name][parameter]
        ir.save(model, directory / f"{name}.onnx")
    return {}


def stored_weights(file: Path) -> dict[str, ir.TensorProtocol]:
    """Weights of an exported graph by parameter name, mapped from their files when they are read."""
    initializers = ir.load(file).graph.initializers
    return {name: v.const_value for name, v in initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}


def differing_weights(graphs: Mapping[str, tuple[Path, Weights]]) -> dict[str, list[str]]:
    """Names of weights that each graph does not hold bit for bit, or should not hold."""
    return {name: _differing(file, weights) for name, (file, weights) in graphs.items()}


def _differing(file: Path, weights: Weights) -> list[str]:
    stored = stored_weights(file)
    differing = weights.keys() ^ stored.keys()
    for name in weights.keys() & stored.keys():
        ours, theirs = weights[name]().contiguous().numpy(), stored[name].numpy()
        # Bytes, because 0 equals -0.
        if (ours.dtype, ours.shape, ours.tobytes()) != (theirs.dtype, theirs.shape, theirs.tobytes()):
            differing.add(name)
    return sorted(differing)


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


def _write_weights(
    file: Path, weights: Weights, known: dict[str, ir.ExternalTensor], progress: Progress
) -> dict[str, ir.ExternalTensor]:
    """Write weights one after the other, and return where each lies; those that are `known` are elsewhere already."""
    stored = dict(known)
    with file.open("wb") as stream:
        for name, read in weights.items():
            if name in known:
                continue
            array = read().contiguous().numpy()
            alignment = ALIGNMENT if array.nbytes >= _SMALL else 64
            stream.write(b"\0" * (-stream.tell() % alignment))
            stored[name] = ir.ExternalTensor(
                file.name,
                stream.tell(),
                array.nbytes,
                ir.DataType.from_numpy(array.dtype),
                shape=ir.Shape(array.shape),
                name=name,
                base_dir=file.parent,
            )
            stream.write(array.data)  # tofile would hide why a write failed
            progress(name, array.nbytes)
    return stored
