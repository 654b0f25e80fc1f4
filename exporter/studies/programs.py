"""Small modules lowered for each backend and run by its runtime, without the rest of a bundle."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.export import export

from exporter.graphs.onnx import OPSET
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet

Run = Callable[..., list[Tensor]]  # runs a module: from its input tensors to its outputs


def lowered(module: nn.Module, *examples: Tensor) -> Run:
    """Lower a module to ExecuTorch and load it.

    Args:
        module: the module; it is switched to evaluation mode.
        examples: inputs with the shapes and dtypes of every later call.

    Returns:
        A function that runs the module on inputs like the examples.
    """
    with quiet(*EXECUTORCH_LOGGERS):
        from executorch.runtime import Runtime  # seconds, which `converted` need not take

        from exporter.graphs.executorch import delegate, emit

        program = Runtime.get().load_program(
            emit(delegate({"forward": export(module.eval(), examples, strict=False)})).buffer
        )
        method = program.load_method("forward")
    assert method is not None
    return lambda *inputs: (program, list(method.execute(inputs)))[1]  # the program must outlive its method


def converted(module: nn.Module, *examples: Tensor) -> Run:
    """Export a module to ONNX and load it in ONNX Runtime, with one thread.

    Args:
        module: the module; it is switched to evaluation mode.
        examples: inputs with the shapes and dtypes of every later call.

    Returns:
        A function that runs the module on inputs like the examples.
    """
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), tempfile.TemporaryDirectory() as directory:
        program = torch.onnx.export(module.eval(), examples, dynamo=True, opset_version=OPSET, verbose=False)
        assert program is not None
        program.save(Path(directory) / "model.onnx", external_data=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(Path(directory) / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(array)
        for array in session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    ]
