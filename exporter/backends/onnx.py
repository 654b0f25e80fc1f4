"""ONNX Runtime: trace each graph without weights, then attach them from files laid out for memory mapping."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from exporter.checkpoint import Weights
from exporter.graphs import DrafterGraph, GraphSpec, TargetGraph, drafter_graph, example_inputs, target_graph
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target
from exporter.pair import Pair
from runtime_ref.manifest import Progress

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


OPS = Ops(linear=_linear, write_rows=_write_rows)


def runtime() -> dict[str, Any]:
    """What the manifest says of the backend."""
    return {"name": "onnx", "opset": OPSET, "onnxruntime": onnxruntime.__version__}


def export_graphs(directory: Path, pair: Pair, progress: Progress) -> None:
    """Write both graphs, `NAME.onnx`, and their weights, `NAME.weights`, into a directory."""
    progress("tracing", 0)
    target, drafter = target_graph(pair.target), drafter_graph(pair.target, pair.drafter)
    models = {
        "target": trace(target, lambda: TargetGraph(Target(pair.target, OPS))),
        "drafter": trace(
            drafter, lambda: DrafterGraph(Drafter(pair.drafter, pair.top_k_clusters, OPS), pair.shared_kv)
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


def stored_weights(file: Path) -> dict[str, ir.TensorProtocol]:
    """Weights of an exported graph by parameter name, mapped from their files when they are read."""
    initializers = ir.load(file).graph.initializers
    return {name: v.const_value for name, v in initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}


def trace(spec: GraphSpec, build: Callable[[], nn.Module]) -> ir.Model:
    """Trace the module that `build` makes; the initializers that are its parameters have no values yet."""
    symbols = sorted({d for port in spec.inputs for d in port.shape if isinstance(d, str)})
    # Sizes must differ and exceed 1: torch.export takes equal ones for one dimension, and 1 for a constant.
    sizes = {name: 3 + i for i, name in enumerate(symbols)}
    dims = {name: Dim(name, min=1) for name in symbols}
    shapes = [{i: dims[d] for i, d in enumerate(port.shape) if isinstance(d, str)} for port in spec.inputs]
    kv_at = next(i for i, port in enumerate(spec.inputs) if port.name.startswith("key_"))
    with _quiet(), FakeTensorMode(), torch.no_grad():
        inputs = example_inputs(spec, sizes)
        program = torch.onnx.export(
            build().eval(),
            (*inputs[:kv_at], list(inputs[kv_at:])),
            dynamic_shapes=(*shapes[:kv_at], shapes[kv_at:]),
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on optional packages and missing values off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
