"""Gemma 4 decoder layers, written once for the target and the drafter and traced for every backend.

Shape letters: T new tokens, S cache rows, H heads, N KV heads, D head dim, E hidden, P PLE dim. There is no batch.
Follows transformers 5.22.2, `models/gemma4/modeling_gemma4.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.modeling.config import AttentionConfig, TextConfig


def write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """Return the cache [N, S, D] with rows [N, T, D] written from `position` [1] on, out of place."""
    return cache.index_copy(1, position + torch.arange(rows.shape[1]), rows)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (Zhang & Sennrich 2019)."""
    if weight is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def rotate_half(x: Tensor) -> Tensor:
    """The halves of the last dimension swapped, the second one negated."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@dataclass(frozen=True)
class Ops:
    """The operations a backend replaces while it traces the model; the defaults are plain torch.

    `top_k` returns the largest values of the last dimension in falling order and their indices, of equal values the
    lower index first; torch itself may keep another.
    """

    embedding: Callable[[Tensor, Tensor], Tensor] = F.embedding
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear
    write_rows: Callable[[Tensor, Tensor, Tensor], Tensor] = write_rows
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor] = rms_norm
    gelu: Callable[[Tensor], Tensor] = gelu
    rotate_half: Callable[[Tensor], Tensor] = rotate_half
    top_k: Callable[[Tensor, int], tuple[Tensor, Tensor]] = torch.topk
    from_int8: Callable[[Tensor], Tensor] = torch.Tensor.float


class RMSNorm(nn.Module):
    """Root mean square norm with the checkpoint's weight, if it has one."""

    def __init__(self, size: int, eps: float, ops: Ops, with_scale: bool = True) -> None:
        super().__init__()
        self.size, self.eps, self.ops = size, eps, ops
        self.weight = nn.Parameter(torch.ones(size)) if with_scale else None

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class ScaledEmbedding(nn.Module):
    """Embedding rows times sqrt(row size), as Gemma feeds them to the decoder."""

    def __init__(self, rows: int, size: int, scale: float, ops: Ops) -> None:
        super().__init__()
        self.scale, self.ops = scale, ops
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.ops.embedding(ids, self.weight))

    def scaled(self, rows: Tensor) -> Tensor:
        """What `forward` makes of rows that were looked up already."""
        return rows * self.scale


def rotary_tables(config: AttentionConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [T, 1, D], for positions [T] (RoPE, Su et al. 2021; `proportional` as in transformers)."""
    dim = config.head_dim
    rotated = dim // 2
    if config.rope_type == "proportional":
        rotated = int(config.partial_rotary_factor * dim // 2)
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, 2 * rotated, 2, dtype=torch.float32) / dim)
    if config.rope_type == "proportional":
        frequencies = F.pad(frequencies, (0, dim // 2 - rotated)) / config.rope_factor
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def additive_mask(visible: Tensor, heads: int) -> Tensor:
    """0 where a key is visible, the lowest float where it is not: [T, S] to [T*heads, S], each row `heads` times."""
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    return mask.index_select(0, torch.arange(visible.shape[0] * heads) // heads)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries [T, H, D] over K and V [N, S, D] under a mask [T*H/N, S]; returns [T, H*D]. The scale is 1.

    The heads that share a KV head are folded into rows, so that K and V are read once per KV head, not per head. Every
    reshape has one unknown dimension: backends fuse those and no others.
    """
    (_, heads, dim), kv_heads = query.shape, key.shape[0]
    folded = (
        query.reshape(-1, kv_heads, heads // kv_heads, dim).permute(1, 0, 2, 3).contiguous().view(kv_heads, -1, dim)
    )
    weights = (torch.bmm(folded, key.transpose(1, 2)) + mask).softmax(-1)
    mixed = torch.bmm(weights, value).reshape(kv_heads, -1, heads // kv_heads, dim)
    return mixed.permute(1, 0, 2, 3).contiguous().view(-1, heads * dim)


class Attention(nn.Module):
    """Attention of one layer; K and V projections exist only where the layer stores its own."""

    def __init__(self, config: TextConfig, layer: int, stores_kv: bool, ops: Ops) -> None:
        super().__init__()
        sizes = config.attention(config.layer_types[layer])
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        self.ops = ops
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim, bias=False)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps, ops)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        if stores_kv:
            self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.dim, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.dim, bias=False)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps, ops)
            self.v_norm = RMSNorm(self.dim, config.rms_norm_eps, ops, with_scale=False)

    def new_kv(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """K and V rows, each [N, T, D], of the layer's normed input x [T, E]."""
        key = self.ops.linear(x, self.k_proj.weight).reshape(-1, self.kv_heads, self.dim)
        value = self.ops.linear(x, self.v_proj.weight).reshape(-1, self.kv_heads, self.dim)
        return self.rotate(self.k_norm(key), rotary).transpose(0, 1), self.v_norm(value).transpose(0, 1)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = self.ops.linear(x, self.q_proj.weight).reshape(-1, self.heads, self.dim)
        query = self.rotate(self.q_norm(query), rotary)
        return self.ops.linear(attend(query, key, value, mask), self.o_proj.weight)

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Apply rotary tables to x [T, H, D]."""
        cos, sin = rotary
        return x * cos + self.ops.rotate_half(x) * sin


class MLP(nn.Module):
    """Gated MLP with tanh-GELU (Shazeer 2020)."""

    def __init__(self, hidden: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.ops.gelu(self.ops.linear(x, self.gate_proj.weight))
        return self.ops.linear(gate * self.ops.linear(x, self.up_proj.weight), self.down_proj.weight)


class DecoderLayer(nn.Module):
    """One decoder layer: attention, MLP, per-layer input (target only), output scalar."""

    def __init__(self, config: TextConfig, layer: int, stores_kv: bool, ops: Ops) -> None:
        super().__init__()
        hidden, eps, ple = config.hidden_size, config.rms_norm_eps, config.hidden_size_per_layer_input
        self.ops = ops
        self.self_attn = Attention(config, layer, stores_kv, ops)
        self.mlp = MLP(hidden, config.mlp_size(layer), ops)
        self.input_layernorm = RMSNorm(hidden, eps, ops)
        self.post_attention_layernorm = RMSNorm(hidden, eps, ops)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps, ops)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps, ops)
        self.layer_scalar = nn.Parameter(torch.ones(1))
        if ple:
            self.per_layer_input_gate = nn.Linear(hidden, ple, bias=False)
            self.per_layer_projection = nn.Linear(ple, hidden, bias=False)
            self.post_per_layer_input_norm = RMSNorm(hidden, eps, ops)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        key: Tensor,
        value: Tensor,
        per_layer_input: Tensor | None = None,
    ) -> Tensor:
        """Run x [T, E]; `normed` is `input_layernorm(x)`, which a storing layer's K and V come from as well."""
        attended = self.self_attn(normed, rotary, mask, key, value)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if per_layer_input is not None:
            gate = self.ops.gelu(self.ops.linear(x, self.per_layer_input_gate.weight))
            projected = self.ops.linear(gate * per_layer_input, self.per_layer_projection.weight)
            x = x + self.post_per_layer_input_norm(projected)
        return x * self.layer_scalar
