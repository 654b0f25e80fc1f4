"""The target: a Gemma 4 E2B/E4B text decoder over a KV cache that is passed in and out."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from exporter.modeling.config import TextConfig
from exporter.modeling.layers import DecoderLayer, Ops, RMSNorm, ScaledEmbedding, additive_mask, rotary_tables


@dataclass(frozen=True)
class TargetOutput:
    """Logits after softcap [R, V], the state after the final norm [R, E], and the updated K and V of storing layers."""

    logits: Tensor
    state: Tensor
    kv: list[Tensor]


class Target(nn.Module):
    """Gemma 4 text decoder with per-layer embeddings (PLE) and KV-shared layers.

    Follows transformers 5.22.2, `Gemma4ForCausalLM`; parameter names are the checkpoint's without its prefix.
    """

    def __init__(self, config: TextConfig, ops: Ops = Ops()) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        hidden, ple, layers = config.hidden_size, config.hidden_size_per_layer_input, config.num_hidden_layers
        self.embed_tokens = ScaledEmbedding(config.vocab_size, hidden, hidden**0.5, ops)
        self.embed_tokens_per_layer = ScaledEmbedding(config.vocab_size_per_layer_input, layers * ple, ple**0.5, ops)
        self.per_layer_model_projection = nn.Linear(hidden, layers * ple, bias=False)
        self.per_layer_projection_norm = RMSNorm(ple, config.rms_norm_eps, ops)
        self.layers = nn.ModuleList(DecoderLayer(config, i, i < config.num_kv_layers, ops) for i in range(layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps, ops)

    def forward(self, tokens: Tensor, position: Tensor, output_rows: Tensor, kv: list[Tensor]) -> TargetOutput:
        """Run T tokens and return the logits and states of R of them.

        Args:
            tokens: [T] int64 ids.
            position: [1] int64, cache rows already valid; the tokens' K/V are written from this row on.
            output_rows: [R] int64, rows of `tokens` whose outputs are wanted. KV-shared layers run on these alone.
            kv: K then V of each storing layer, each [N, S, D]; rows from `position` on may hold anything finite.
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
        """`forward` for tokens that were looked up already, over sliding layers' caches that begin later.

        Args:
            embedded: [T, E], scaled; `per_layer` [T, layers*P] as well.
            window_start: [1] int64, the position that row 0 of sliding layers' buffers holds.
        """
        config = self.config
        per_layer = self._per_layer_inputs(per_layer, embedded)
        positions = position + torch.arange(embedded.shape[0])
        rows = {"full_attention": position, "sliding_attention": position - window_start}
        rotary, masks = self._geometry(positions, window_start, kv)
        kv, x = list(kv), embedded
        for i, layer in enumerate(cast(list[DecoderLayer], self.layers)):
            layer_type = config.layer_types[i]
            if i == config.num_kv_layers:
                x, per_layer = x.index_select(0, output_rows), per_layer.index_select(0, output_rows)
                rotary, masks = self._geometry(position + output_rows, window_start, kv)
            normed = layer.input_layernorm(x)
            source = i if i < config.num_kv_layers else config.kv_source(layer_type)
            if i < config.num_kv_layers:
                key, value = layer.self_attn.new_kv(normed, rotary[layer_type])
                kv[2 * i] = self.ops.write_rows(kv[2 * i], key, rows[layer_type])
                kv[2 * i + 1] = self.ops.write_rows(kv[2 * i + 1], value, rows[layer_type])
            key, value = kv[2 * source], kv[2 * source + 1]
            x = layer(x, normed, rotary[layer_type], masks[layer_type], key, value, per_layer.select(1, i))
        if config.num_kv_layers == config.num_hidden_layers:
            x = x.index_select(0, output_rows)
        state = self.norm(x)
        logits = self.ops.linear(state, self.embed_tokens.weight)
        if (cap := config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return TargetOutput(logits, state, kv)

    def _per_layer_inputs(self, identity: Tensor, embedded: Tensor) -> Tensor:
        """Per-layer inputs [T, layers, P]: token identity and projected context, averaged with variance kept."""
        config = self.config
        shape = (-1, config.num_hidden_layers, config.hidden_size_per_layer_input)
        context = self.ops.linear(embedded, self.per_layer_model_projection.weight) * config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.reshape(shape))
        return (context + identity.reshape(shape)) * 2.0**-0.5

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
            behind = positions.unsqueeze(1) - keys  # how far each key lies behind its query
            visible = behind >= 0
            if layer_type == "sliding_attention":
                visible &= behind < config.sliding_window
            heads = config.num_attention_heads // sizes.num_key_value_heads
            masks[layer_type] = additive_mask(visible, heads)
        return rotary, masks


def empty_kv(config: TextConfig, rows: int) -> list[Tensor]:
    """Zeroed K and V of every storing layer, each [N, rows, D] float32."""
    kv = []
    for layer_type in config.layer_types[: config.num_kv_layers]:
        sizes = config.attention(layer_type)
        kv += [torch.zeros(sizes.num_key_value_heads, rows, sizes.head_dim) for _ in ("key", "value")]
    return kv
