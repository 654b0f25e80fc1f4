"""How kernels round the inputs of quantized matrices to 8 bits, for comparing with what bundles compute."""

import torch
from torch import Tensor


def rounded_rows(x: Tensor) -> Tensor:
    """Round x [.., columns] as XNNPACK does: integers of 8 bits with a scale and a zero point for each row."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).round() * scale


def rounded_blocks(x: Tensor, size: int) -> Tensor:
    """Round x [.., columns] as ONNX Runtime's MatMulNBits does: symmetric integers, a scale for `size` columns.

    So on x86-64, to the last bits; kernels of 4 bits on arm64 have a scale for each row.
    """
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / scale).round() * scale).flatten(-2)[..., :columns]
