"""Replacements of the model's operations that XNNPACK supports, or that the portable kernels run without copies."""

import math

import torch
import torch.ao.quantization.fx._decomposed  # defines dequantize_per_tensor
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.modeling.layers import Ops, RMSNorm


class Constants(nn.Module):
    """The constant matrices of some operations, as buffers: XNNPACK takes only constants of a program as weights."""

    def ops(self) -> Ops:
        """Return the operations to build a module with; pass the module to `register` before it is traced."""
        return Ops(
            write_rows=_write_rows,
            rms_norm=self._rms_norm,
            gelu=gelu,
            rotate_half=self._rotate_half,
            top_k=top_k,
            from_int8=_from_int8,
        )

    def register(self, module: nn.Module) -> None:
        """Add the buffers that a module's operations need to the module, as its submodule `constants`."""
        for size in {norm.size for norm in module.modules() if isinstance(norm, RMSNorm)}:
            self.register_buffer(f"mean_{size}", torch.full((1, size), 1 / size))
        self.register_buffer("turn", torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        module.add_module("constants", self)

    def _rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Compute the mean as a linear layer whose weights are all 1/size: XNNPACK has no mean over one dimension."""
        mean = F.linear(x * x, self.get_buffer(f"mean_{x.shape[-1]}"))
        x = x * torch.rsqrt(mean + eps)
        return x if weight is None else x * weight

    def _rotate_half(self, x: Tensor) -> Tensor:
        """Swap the halves, exactly, by a 2x2 matrix: XNNPACK cannot slice tensors of dynamic shape."""
        _, heads, dim = x.shape
        pairs = x.reshape(-1, 2, dim // 2).transpose(1, 2)
        return F.linear(pairs, self.get_buffer("turn")).transpose(1, 2).contiguous().view(-1, heads, dim)


def _from_int8(values: Tensor) -> Tensor:
    """Dequantize with a scale of 1, which XNNPACK supports; a cast would run in a slow portable kernel."""
    return torch.ops.quantized_decomposed.dequantize_per_tensor(values, 1.0, 0, -128, 127, torch.int8)


def _write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    return torch.ops.aten.index_put_(cache, [None, position + torch.arange(rows.shape[1])], rows)


def gelu(x: Tensor) -> Tensor:
    """Return tanh-GELU of x, any shape, as x * sigmoid(2u): XNNPACK would compute the GELU operation as erf-GELU."""
    slope = 2 * math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (x * x * (0.044715 * slope) + slope))


_BLOCK_VALUES = 128


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their indices; of equal values the lower index comes first.

    ExecuTorch's own top-k keeps any of equal values. The k largest values lie in the k blocks of 128 values with the
    largest maxima, so only those blocks are sorted.

    Args:
        values: [T, V] float32, finite, V at most 2^24.
        k: how many to return, at most V.

    Returns:
        Values [T, k] float32 in falling order and their indices [T, k] int64.
    """
    rows, size = values.shape
    blocks = -(-size // _BLOCK_VALUES)
    if blocks <= k:
        return _ordered_top_k(values, torch.arange(size).expand_as(values), k)
    if size % _BLOCK_VALUES:  # padded with the lowest float, because a program cannot hold -inf
        values = F.pad(values, (0, blocks * _BLOCK_VALUES - size), value=torch.finfo(values.dtype).min)
    by_block = values.reshape(-1, _BLOCK_VALUES)
    maxima = by_block.amax(-1).reshape(-1, blocks)
    _, kept = _ordered_top_k(maxima, torch.arange(blocks).expand_as(maxima), k)
    # Blocks are selected as rows of one matrix: whole rows are copied fast, single values slowly.
    at = (torch.arange(rows).unsqueeze(1) * blocks + kept).reshape(-1)
    ids = kept.unsqueeze(2) * _BLOCK_VALUES + torch.arange(_BLOCK_VALUES)
    candidates = by_block.index_select(0, at).reshape(-1, k * _BLOCK_VALUES)
    return _ordered_top_k(candidates, ids.reshape(-1, k * _BLOCK_VALUES), k)


def _ordered_top_k(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of values [T, n] and their ids; of equal values the lower id comes first.

    In float64 each value is lowered in proportion to its id, by less than the distance to the next float32: this orders
    equal values and changes nothing else.
    """
    exact = values.double()
    at = (exact - (exact.abs() + 1e-45) * (ids * 2.0**-50)).topk(k).indices
    return values.gather(1, at), ids.gather(1, at)
