"""The target: a Gemma 4 E2B/E4B text decoder over a KV cache that is passed in and out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from exporter.modeling.config import TextConfig
from exporter.modeling.layers import DecoderLayer, Linear, Ops, RMSNorm, ScaledEmbedding, additive_mask, rotary_tables
from exporter.modeling.weights import parameter_shapes

OWN_HEAD = "lm_head.weight"  # the parameter of a head that is not the embedding

# The lowest float stands for minus infinity, with which some kernels compute NaN.
SUPPRESSED_LOGIT = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class TargetOutput:
    """What a pass of the target returns, for R of its T tokens.

    Attributes:
        logits: [R, V] float32, after the softcap; `SUPPRESSED_LOGIT` for suppressed tokens.
        state: [R, E] float32, after the final norm.
        kv: K, then V, of each storing layer, each [N, S, D] float32, with the rows of all T tokens.
    """

    logits: Tensor
    state: Tensor
    kv: list[Tensor]


@dataclass
class TargetPass:
    """A pass of the target between two of its layers.

    Attributes:
        x: [T, E] float32, hidden states; from the KV-shared layers on only of tokens whose outputs are wanted.
        per_layer: [T, layers, P] float32, per-layer inputs of the same tokens.
        kv: K, then V, of each storing layer, each [N, S, D] float32; layers write into this list.
        rows: [1] int64, the cache row of the first token, by layer type.
        rotary: cosines and sines, each [T, 1, D], by layer type.
        masks: [T*H/N, S] float32, by layer type.
    """

    x: Tensor
    per_layer: Tensor
    kv: list[Tensor]
    rows: dict[str, Tensor]
    rotary: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]


class Target(nn.Module):
    """Gemma 4 text decoder with per-layer embeddings (PLE) and KV-shared layers.

    Parameter names are the checkpoint's without their prefix. Follows transformers 5.24.0, `Gemma4ForCausalLM`.
    """

    def __init__(self, config: TextConfig, ops: Ops = Ops(), suppresses: bool = False, own_head: bool = False) -> None:
        """Make the module.

        Args:
            config: its sizes.
            ops: operations that a backend spells in its own way.
            suppresses: whether there is a parameter `suppressed` [V] float32, which is added to logits:
                `SUPPRESSED_LOGIT` for tokens that are never generated, else 0.
            own_head: whether logits are computed with a matrix of its own, not with the embedding.
        """
        super().__init__()
        self.config, self.ops = config, ops
        hidden, ple, layers = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
        self.embed_tokens = ScaledEmbedding(config.vocab_size, hidden, hidden**0.5, ops)
        self.embed_tokens_per_layer = ScaledEmbedding(config.vocab_size_per_layer_input, layers * ple, ple**0.5, ops)
        self.per_layer_model_projection = Linear(hidden, layers * ple, ops)
        self.per_layer_projection_norm = RMSNorm(ple, config.rms_norm_eps, ops)
        self.layers = nn.ModuleList(DecoderLayer(config, i, i < config.num_kv_layers, ops) for i in range(layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps, ops)
        self.lm_head = Linear(hidden, config.vocab_size, ops) if own_head else None
        self.suppressed = nn.Parameter(torch.empty(config.vocab_size)) if suppresses else None

    def forward(self, tokens: Tensor, position: Tensor, output_rows: Tensor, kv: list[Tensor]) -> TargetOutput:
        """Run T tokens and return the logits and states of R of them.

        Args:
            tokens: [T] int64 token ids.
            position: [1] int64, number of valid cache rows; the tokens' K and V are written from this row on.
            output_rows: [R] int64, indices into `tokens` to return outputs for. KV-shared layers run on these alone.
            kv: K, then V, of each storing layer, each [N, S, D] float32; rows from `position` on may hold any finite
                values.
        """
        embedded, per_layer = self.embed_tokens(tokens), self.embed_tokens_per_layer(tokens)
        return self.decode(embedded, per_layer, position, torch.zeros_like(position), output_rows, kv)

    def decode(
        self,
        embedded: Tensor,
        per_layer: Tensor,
        position: Tensor,
        window_start: Tensor,
        output_rows: Tensor,
        kv: list[Tensor],
    ) -> TargetOutput:
        """Do what `forward` does, from embedding rows and with sliding layers' buffers that need not begin at token 0.

        Args:
            embedded: [T, E] float32, scaled rows of `embed_tokens`.
            per_layer: [T, layers*P] float32, scaled rows of `embed_tokens_per_layer`.
            position: as in `forward`.
            window_start: [1] int64, the token position of row 0 of sliding layers' buffers.
            output_rows: as in `forward`.
            kv: as in `forward`; a sliding layer's row i holds position `window_start` + i.
        """
        config = self.config
        run = self.begin(embedded, per_layer, position, window_start, kv)
        for i in range(config.num_hidden_layers):
            if i == config.num_kv_layers:
                run.x, run.per_layer = run.x.index_select(0, output_rows), run.per_layer.index_select(0, output_rows)
                run.rotary, run.masks = self._geometry(position + output_rows, window_start, run.kv)
            self.run_layer(i, run)
        x = run.x
        if config.num_kv_layers == config.num_hidden_layers:
            x = x.index_select(0, output_rows)
        state = self.norm(x)
        logits = (self.lm_head or self.embed_tokens).multiply(state)
        if (cap := config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        if self.suppressed is not None:
            logits = logits + self.suppressed
        return TargetOutput(logits, state, run.kv)

    def begin(
        self, embedded: Tensor, per_layer: Tensor, position: Tensor, window_start: Tensor, kv: list[Tensor]
    ) -> TargetPass:
        """Return a pass before its first layer; the arguments are those of `decode`."""
        rows = {"full_attention": position, "sliding_attention": position - window_start}
        per_layer = self._per_layer_inputs(per_layer, embedded)
        geometry = self._geometry(position + torch.arange(embedded.shape[0]), window_start, kv)
        return TargetPass(embedded, per_layer, list(kv), rows, *geometry)

    def run_layer(self, i: int, run: TargetPass) -> None:
        """Run layer `i` of a pass, which gets its hidden states, K and V."""
        config, layer, kv = self.config, cast(DecoderLayer, self.layers[i]), run.kv
        layer_type = config.layer_types[i]
        rotary, mask, rows = run.rotary[layer_type], run.masks[layer_type], run.rows[layer_type]
        normed = layer.input_layernorm(run.x)
        source = i if i < config.num_kv_layers else config.kv_source(layer_type)
        if i < config.num_kv_layers:
            key, value = layer.self_attn.new_kv(normed, rotary)
            kv[2 * i] = self.ops.write_rows(kv[2 * i], key, rows)
            kv[2 * i + 1] = self.ops.write_rows(kv[2 * i + 1], value, rows)
        key, value = kv[2 * source], kv[2 * source + 1]
        run.x = layer(run.x, normed, rotary, mask, key, value, run.per_layer.select(1, i))

    def _per_layer_inputs(self, per_layer: Tensor, embedded: Tensor) -> Tensor:
        """Per-layer inputs [T, layers, P] from the token's rows [T, layers*P] and its embedding [T, E].

        The two terms are added and divided by sqrt(2), which keeps their variance.
        """
        config = self.config
        shape = (-1, config.num_hidden_layers, config.hidden_size_per_layer_input)
        context = self.per_layer_model_projection(embedded) * config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.reshape(shape))
        return (context + per_layer.reshape(shape)) * 2.0**-0.5

    def _geometry(self, positions: Tensor, window_start: Tensor, kv: list[Tensor]) -> tuple[dict, dict]:
        """Rotary tables and causal masks by layer type, for query positions [T] over the cache."""
        config = self.config
        rotary, masks = {}, {}
        for layer_type in sorted(set(config.layer_types)):
            sizes = config.attention(layer_type)
            rotary[layer_type] = rotary_tables(sizes, positions)
            keys = torch.arange(kv[2 * config.kv_source(layer_type)].shape[1])
            if layer_type == "sliding_attention":
                keys = keys + window_start
            distance = positions.unsqueeze(1) - keys  # [T, S], from a key to its query
            visible = distance >= 0
            if layer_type == "sliding_attention":
                visible &= distance < config.sliding_window
            masks[layer_type] = additive_mask(visible, config.num_attention_heads // sizes.num_key_value_heads)
        return rotary, masks


@cache
def target_shapes(config: TextConfig, own_head: bool = False) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each parameter of `Target`, by name; making the module takes longer than a look."""
    return MappingProxyType(parameter_shapes(lambda: Target(config, own_head=own_head)))


def empty_kv(config: TextConfig, rows: int) -> list[Tensor]:
    """Return a zeroed cache: K, then V, of each storing layer, each [N, rows, D] float32."""
    kv = []
    for layer_type in config.layer_types[: config.num_kv_layers]:
        sizes = config.attention(layer_type)
        kv += [torch.zeros(sizes.num_key_value_heads, rows, sizes.head_dim) for _ in ("key", "value")]
    return kv


def is_suppressed(logits: Tensor) -> Tensor:
    """Return which logits, of any shape and float dtype, are of suppressed tokens."""
    return logits < SUPPRESSED_LOGIT / 2
