"""The drafter: a small decoder that reads the target's KV cache and has none of its own."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from clustering.cluster_table import TwoStageSizes
from exporter.modeling.config import DrafterConfig
from exporter.modeling.layers import DecoderLayer, Linear, Ops, RMSNorm, ScaledEmbedding, additive_mask, rotary_tables
from exporter.modeling.two_stage import DenseHead, TwoStageHead
from exporter.modeling.weights import parameter_shapes

# K and V, each [N, S, D] float32, by layer type.
KV = Mapping[str, tuple[Tensor, Tensor]]


def kv_by_type(kv: Sequence[Tensor], layers: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pick the K and V that a drafter reads from a target's cache.

    Args:
        kv: K, then V, of each storing layer, each [N, S, D] (or with a batch dimension in front).
        layers: index of the storing layer, by layer type, as `exporter.modeling.config.shared_kv` returns it.
    """
    return {layer_type: (kv[2 * layer], kv[2 * layer + 1]) for layer_type, layer in layers.items()}


class Drafter(nn.Module):
    """Gemma 4 multi-token-prediction (MTP) drafter; one call is one draft step.

    E is the drafter's hidden size, E_target the target's.
    Follows transformers 5.24.0, `Gemma4AssistantForCausalLM` and `SinglePositionMultiTokenCandidateGenerator`.
    """

    def __init__(
        self, config: DrafterConfig, two_stage: TwoStageSizes | None, ops: Ops = Ops(), cluster_bits: int = 32
    ) -> None:
        """Build a drafter; its parameter `target_embed_tokens` is the target's embedding, which may have more rows.

        Args:
            config: sizes of the drafter.
            two_stage: sizes of a two-stage head; None for a dense one.
            ops: operations of the backend.
            cluster_bits: bits of a weight in a two-stage head's clusters: 32, 8 or 4.
        """
        super().__init__()
        text, backbone = config.text, config.backbone_hidden_size
        self.config, self.ops = config, ops
        self.target_embed_tokens = ScaledEmbedding(text.vocab_size, backbone, backbone**0.5, ops)
        self.pre_projection = Linear(2 * backbone, text.hidden_size, ops)
        self.layers = nn.ModuleList(DecoderLayer(text, i, False, ops) for i in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, ops)
        self.post_projection = Linear(text.hidden_size, backbone, ops)
        self.head: DenseHead | TwoStageHead
        if two_stage is None:
            self.head = DenseHead(text.vocab_size, text.hidden_size, ops)
        else:
            self.head = TwoStageHead(text.hidden_size, two_stage, ops, cluster_bits)

    def forward(self, tokens: Tensor, states: Tensor, positions: Tensor, kv: KV) -> tuple[Tensor, Tensor]:
        """Run one draft step for each of T independent rounds; inference has T = 1.

        `last` is the newest accepted token of a round, which the target has not run yet.

        Args:
            tokens: [T] int64, `last` in the first step of a round, later the draft token of the previous step.
            states: [T, E_target] float32, in the first step the target's state at the token before `last`, later the
                states that the previous step returned.
            positions: [T] int64, position of `last`, which is also the number of valid cache rows; it stays the same
                in all steps of a round.
            kv: K and V of the target layers that the drafter reads, each [N, S, D] float32, by layer type.

        Returns:
            Draft tokens [T] int64, and the states [T, E_target] float32 for the next step.
        """
        start = torch.zeros(1, dtype=torch.int64)
        hidden, states = self.step(self.target_embed_tokens(tokens), states, positions, start, kv)
        return self.head(hidden), states

    def step(
        self,
        embedded: Tensor,
        states: Tensor,
        positions: Tensor,
        window_start: Tensor,
        kv: KV,
    ) -> tuple[Tensor, Tensor]:
        """Do what `forward` does, from embedding rows, without the head and with sliding buffers that begin later.

        Args:
            embedded: [T, E_target] float32, scaled rows of `target_embed_tokens`.
            states: as in `forward`.
            positions: as in `forward`.
            window_start: [1] int64, the token position of row 0 of sliding layers' buffers.
            kv: as in `forward`; row i of the sliding type holds position `window_start` + i.

        Returns:
            Hidden states [T, E] float32 for the head, and the states [T, E_target] float32 for the next step.
        """
        text = self.config.text
        x = torch.cat((embedded, states), dim=-1)
        x = self.pre_projection(x)
        rotary = {layer_type: rotary_tables(text.attention(layer_type), positions) for layer_type in kv}
        masks = {
            layer_type: self._mask(layer_type, positions, window_start, key.shape[1])
            for layer_type, (key, _) in kv.items()
        }
        for layer, layer_type in zip(cast(list[DecoderLayer], self.layers), text.layer_types, strict=True):
            x = layer(x, layer.input_layernorm(x), rotary[layer_type], masks[layer_type], *kv[layer_type])
        hidden = self.norm(x)
        return hidden, self.post_projection(hidden)

    def _mask(self, layer_type: str, positions: Tensor, window_start: Tensor, rows: int) -> Tensor:
        """Mask that shows the rows before `last`; its own K/V and those of rejected drafts are never visible.

        The reference measures the window from the newest cache row and includes both ends: window + 1 keys.
        """
        text, sliding = self.config.text, layer_type == "sliding_attention"
        distance = positions.unsqueeze(1) - (torch.arange(rows) + (window_start if sliding else 0))  # [T, S]
        visible = distance >= 1
        if sliding:
            visible &= distance <= text.sliding_window + 1
        return additive_mask(visible, text.num_attention_heads // text.attention(layer_type).num_key_value_heads)


@cache
def drafter_shapes(config: DrafterConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each parameter of `Drafter` with a dense head, by name."""
    return MappingProxyType(parameter_shapes(lambda: Drafter(config, None)))
