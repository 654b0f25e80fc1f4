"""The model's operations in the forms that XNNPACK takes, or that read and write memory where it lies."""

import math

import torch
import torch.ao.quantization.fx._decomposed  # defines dequantize_per_tensor
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.modeling.layers import Ops, RMSNorm


class Constants(nn.Module):
    """Buffers that some operations multiply by: XNNPACK takes as weights only what a program holds as constants."""

    def ops(self) -> Ops:
        """Operations to build a module with; `register` it before it is traced."""
        return Ops(
            write_rows=_write_rows,
            rms_norm=self._rms_norm,
            gelu=gelu,
            rotate_half=self._rotate_half,
            top_k=top_k,
            from_int8=_from_int8,
        )

    def register(self, module: nn.Module) -> None:
        """Make the buffers that a module's operations need part of it."""
        for size in {norm.size for norm in module.modules() if isinstance(norm, RMSNorm)}:
            self.register_buffer(f"mean_{size}", torch.full((1, size), 1 / size))
        self.register_buffer("turn", torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        module.add_module("constants", self)

    def _rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """XNNPACK has no mean over one dimension, but linear layers, whose weights may all be 1/size."""
        mean = F.linear(x * x, self.get_buffer(f"mean_{x.shape[-1]}"))
        x = x * torch.rsqrt(mean + eps)
        return x if weight is None else x * weight

    def _rotate_half(self, x: Tensor) -> Tensor:
        """XNNPACK slices only what has static shapes; a 2x2 matrix turns the halves as well, and exactly."""
        _, heads, dim = x.shape
        pairs = x.reshape(-1, 2, dim // 2).transpose(1, 2)
        return F.linear(pairs, self.get_buffer("turn")).transpose(1, 2).contiguous().view(-1, heads, dim)


def _from_int8(values: Tensor) -> Tensor:
    """XNNPACK converts numbers that are quantized, if only with a scale of 1; a plain cast stays portable and slow."""
    return torch.ops.quantized_decomposed.dequantize_per_tensor(values, 1.0, 0, -128, 127, torch.int8)


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    return torch.ops.aten.index_put_(cache, [None, position + torch.arange(rows.shape[1])], rows)


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU in its other form, x * sigmoid(2u): XNNPACK would make erf-GELU of the operation."""
    slope = 2 * math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (x * x * (0.044715 * slope) + slope))


_BLOCK = 128


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`Ops.top_k` of values [T, V], V up to 2^24: ExecuTorch's own keeps any of equal values.

    The k best blocks of 128 hold the k best values, so that only they are sorted.
    """
    rows, size = values.shape
    blocks = -(-size // _BLOCK)
    if blocks <= k:
        return _ordered_top_k(values, torch.arange(size).expand_as(values), k)
    if size % _BLOCK:  # a program cannot hold -inf
        values = F.pad(values, (0, blocks * _BLOCK - size), value=torch.finfo(values.dtype).min)
    by_block = values.reshape(-1, _BLOCK)
    best = by_block.amax(-1).reshape(-1, blocks)
    _, kept = _ordered_top_k(best, torch.arange(blocks).expand_as(best), k)
    at = (torch.arange(rows).unsqueeze(1) * blocks + kept).reshape(-1)  # whole rows are copied fast, single values not
    ids = kept.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK)
    return _ordered_top_k(by_block.index_select(0, at).reshape(-1, k * _BLOCK), ids.reshape(-1, k * _BLOCK), k)


def _ordered_top_k(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest values and their ids. Equal ones are set apart in float64, by less than the next float32 is away."""
    exact = values.double()
    at = (exact - (exact.abs() + 1e-45) * (ids * 2.0**-50)).topk(k).indices
    return values.gather(1, at), ids.gather(1, at)
