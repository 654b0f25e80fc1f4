"""Gemma 4 decoder layers, written once for the target and the drafter and traced for every backend.

Shape letters: T new tokens, S cache rows, H heads, N KV heads, D head dim, E hidden, P PLE dim. There is no batch
dimension. Tensors are float32 unless a docstring says otherwise. Follows transformers 5.24.0,
`models/gemma4/modeling_gemma4.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.modeling.config import AttentionConfig, TextConfig


def write_rows(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """Return a copy of the cache with new rows written to it.

    Args:
        cache: [N, S, D].
        rows: [N, T, D].
        position: [1] int64, the cache row that the first new row is written to.
    """
    return cache.index_copy(1, position + torch.arange(rows.shape[1]), rows)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Apply a root mean square norm over the last dimension (Zhang & Sennrich 2019).

    Args:
        x: [..., size].
        weight: [size] factors; None for no factors.
        eps: number added to the mean square.
    """
    if weight is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def gelu(x: Tensor) -> Tensor:
    """Apply GELU elementwise in its tanh approximation (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def rotate_half(x: Tensor) -> Tensor:
    """Swap the halves [a, b] of the last dimension and negate the second: [-b, a]."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@dataclass(frozen=True)
class Ops:
    """Operations that a backend replaces while it traces the model; the defaults are plain torch.

    Attributes:
        embedding: (ids [T] int64, table [rows, columns]) -> [T, columns].
        linear: (x [T, inputs], weight [outputs, inputs]) -> [T, outputs].
        write_rows: see `write_rows`.
        rms_norm: see `rms_norm`.
        gelu: see `gelu`.
        rotate_half: see `rotate_half`.
        top_k: (x [T, size], k) -> the k largest values of each row in descending order and their indices int64, both
            [T, k]. A backend puts the lower index first among equal values; torch may order them otherwise.
        from_int8: converts an int8 tensor to float32.
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
    """Root mean square norm over the last dimension, with a learned weight unless `with_scale` is False."""

    def __init__(self, size: int, eps: float, ops: Ops, with_scale: bool = True) -> None:
        super().__init__()
        self.size, self.eps, self.ops = size, eps, ops
        self.weight = nn.Parameter(torch.ones(size)) if with_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., size]; the shape stays."""
        return self.ops.rms_norm(x, self.weight, self.eps)


def round_to_grid(x: Tensor, scale: Tensor) -> Tensor:
    """Round x to 8-bit integers times a scale, as `apply_srq` of transformers 5.24.0 does.

    Args:
        x: any shape.
        scale: [1], not 0.
    """
    return (x / scale).round().clamp(-128, 127) * scale


class Matrix(nn.Module):
    """A matrix that tokens are multiplied with.

    Attributes:
        weight: [rows, columns].
        factors: [rows], of its products; None unless a backend stores the weight without a part of its scales.
        input_scale: [1], of the grid of 8 bits that inputs are rounded to; None if a checkpoint has none.
        output_scale: [1], the same of products.
    """

    factors: Tensor | None
    input_scale: Tensor | None
    output_scale: Tensor | None

    def __init__(self, rows: int, columns: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(rows, columns))
        for name in ("factors", "input_scale", "output_scale"):
            self.register_parameter(name, None)

    def multiply(self, x: Tensor) -> Tensor:
        """Map x [T, columns] to [T, rows]."""
        x = x if self.input_scale is None else round_to_grid(x, self.input_scale)
        products = self.ops.linear(x, self.weight)
        products = products if self.factors is None else products * self.factors
        return products if self.output_scale is None else round_to_grid(products, self.output_scale)


class Linear(Matrix):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int, ops: Ops) -> None:
        super().__init__(outputs, inputs, ops)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [T, inputs] to [T, outputs]."""
        return self.multiply(x)


class ScaledEmbedding(Matrix):
    """An embedding table whose rows are multiplied by a constant; Gemma uses the square root of the row size.

    Where it is the head as well, `multiply` gives logits.
    """

    def __init__(self, rows: int, size: int, scale: float, ops: Ops) -> None:
        super().__init__(rows, size, ops)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scaled embedding rows [T, size] of token ids [T] int64."""
        return self.scaled(self.ops.embedding(ids, self.weight))

    def scaled(self, rows: Tensor) -> Tensor:
        """Scale embedding rows [T, size] that were read from the table already."""
        return rows * self.scale


def rotary_tables(config: AttentionConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of rotary position embedding (RoPE, Su et al. 2021).

    Args:
        config: head size and type of the embedding; the type `proportional` is computed as in transformers.
        positions: [T] int64 token positions.

    Returns:
        Cosines and sines, each [T, 1, D].
    """
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


def additive_mask(visible: Tensor, heads_per_kv: int) -> Tensor:
    """Make the mask that `attend` adds to attention scores.

    Args:
        visible: [T, S] bool, whether a query sees a key.
        heads_per_kv: H/N, the number of query heads that read one KV head; each row of the mask is repeated that often.

    Returns:
        [T*H/N, S]: 0 where a key is visible, the lowest float32 elsewhere.
    """
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    return mask.index_select(0, torch.arange(visible.shape[0] * heads_per_kv) // heads_per_kv)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Compute grouped-query attention (Ainslie et al. 2023) with scale 1.

    The query heads of a KV head become rows of one matrix, so that K and V are read once per KV head, not once per
    query head. Each reshape leaves one dimension to be inferred: backends fuse only such reshapes.

    Args:
        query: [T, H, D].
        key: [N, S, D].
        value: [N, S, D].
        mask: [T*H/N, S], as `additive_mask` returns it.

    Returns:
        [T, H*D].
    """
    (_, heads, dim), kv_heads = query.shape, key.shape[0]
    folded = (
        query.reshape(-1, kv_heads, heads // kv_heads, dim).permute(1, 0, 2, 3).contiguous().view(kv_heads, -1, dim)
    )
    weights = (torch.bmm(folded, key.transpose(1, 2)) + mask).softmax(-1)
    mixed = torch.bmm(weights, value).reshape(kv_heads, -1, heads // kv_heads, dim)
    return mixed.permute(1, 0, 2, 3).contiguous().view(-1, heads * dim)


class Attention(nn.Module):
    """Attention of one layer; projections for K and V exist only in layers that store them."""

    def __init__(self, config: TextConfig, layer: int, stores_kv: bool, ops: Ops) -> None:
        super().__init__()
        sizes = config.attention(config.layer_types[layer])
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        self.ops = ops
        self.q_proj = Linear(config.hidden_size, self.heads * self.dim, ops)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps, ops)
        self.o_proj = Linear(self.heads * self.dim, config.hidden_size, ops)
        if stores_kv:
            self.k_proj = Linear(config.hidden_size, self.kv_heads * self.dim, ops)
            self.v_proj = Linear(config.hidden_size, self.kv_heads * self.dim, ops)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps, ops)
            self.v_norm = RMSNorm(self.dim, config.rms_norm_eps, ops, with_scale=False)

    def new_kv(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the K and V rows of new tokens; only for layers that store K and V.

        Args:
            x: [T, E], the layer's input after `input_layernorm`.
            rotary: cosines and sines, each [T, 1, D].

        Returns:
            K and V, each [N, T, D].
        """
        key = self.k_proj(x).reshape(-1, self.kv_heads, self.dim)
        value = self.v_proj(x).reshape(-1, self.kv_heads, self.dim)
        return self.rotate(self.k_norm(key), rotary).transpose(0, 1), self.v_norm(value).transpose(0, 1)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the attention output of T tokens over cached K and V.

        Args:
            x: [T, E], the layer's input after `input_layernorm`.
            rotary: cosines and sines, each [T, 1, D].
            mask: [T*H/N, S], as `additive_mask` returns it.
            key: [N, S, D].
            value: [N, S, D].

        Returns:
            [T, E].
        """
        query = self.q_proj(x).reshape(-1, self.heads, self.dim)
        query = self.rotate(self.q_norm(query), rotary)
        return self.o_proj(attend(query, key, value, mask))

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate x [T, heads, D] by cosines and sines, each [T, 1, D]; the shape stays."""
        cos, sin = rotary
        return x * cos + self.ops.rotate_half(x) * sin


class MLP(nn.Module):
    """Gated MLP with GELU (Shazeer 2020)."""

    def __init__(self, hidden: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_proj = Linear(hidden, inner, ops)
        self.up_proj = Linear(hidden, inner, ops)
        self.down_proj = Linear(inner, hidden, ops)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [T, E] to [T, E]."""
        gate = self.ops.gelu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One decoder layer: attention, MLP, per-layer input (in the target only) and an output factor."""

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
            self.per_layer_input_gate = Linear(hidden, ple, ops)
            self.per_layer_projection = Linear(ple, hidden, ops)
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
        """Run the layer on T tokens.

        Args:
            x: [T, E].
            normed: [T, E], `input_layernorm(x)`; an argument because `Attention.new_kv` needs it before this call.
            rotary: cosines and sines, each [T, 1, D].
            mask: [T*H/N, S], as `additive_mask` returns it.
            key: [N, S, D].
            value: [N, S, D].
            per_layer_input: [T, P], this layer's part of the per-layer inputs; None in a drafter.

        Returns:
            [T, E].
        """
        attended = self.self_attn(normed, rotary, mask, key, value)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        if per_layer_input is not None:
            gate = self.ops.gelu(self.per_layer_input_gate(x))
            projected = self.per_layer_projection(gate * per_layer_input)
            x = x + self.post_per_layer_input_norm(projected)
        return x * self.layer_scalar
