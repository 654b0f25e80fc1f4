"""The drafter: a small decoder with no KV of its own that reads the target's cache."""

from typing import cast

import torch
from torch import Tensor, nn

from clustering.cluster_table import TwoStageSizes
from exporter.config import DrafterConfig
from exporter.modeling.layers import DecoderLayer, Ops, RMSNorm, ScaledEmbedding, additive_mask, rotary_tables
from exporter.modeling.two_stage import DenseHead, TwoStageHead


class Drafter(nn.Module):
    """Gemma 4 multi-token-prediction drafter; one call is one draft step.

    Follows transformers 5.22.2, `Gemma4AssistantForCausalLM` and `SinglePositionMultiTokenCandidateGenerator`.
    """

    def __init__(
        self, config: DrafterConfig, two_stage: TwoStageSizes | None, ops: Ops = Ops(), cluster_bits: int = 32
    ) -> None:
        """`two_stage` None builds a dense head; `target_embed_tokens` is the target's own table."""
        super().__init__()
        text, backbone = config.text, config.backbone_hidden_size
        self.config, self.ops = config, ops
        self.target_embed_tokens = ScaledEmbedding(text.vocab_size, backbone, backbone**0.5, ops)
        self.pre_projection = nn.Linear(2 * backbone, text.hidden_size, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(text, i, False, ops) for i in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, ops)
        self.post_projection = nn.Linear(text.hidden_size, backbone, bias=False)
        self.head: DenseHead | TwoStageHead
        if two_stage is None:
            self.head = DenseHead(text.vocab_size, text.hidden_size, ops)
        else:
            self.head = TwoStageHead(text.hidden_size, two_stage, ops, cluster_bits)

    def forward(
        self, tokens: Tensor, states: Tensor, positions: Tensor, kv: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """One draft step for each of T independent rounds; inference has T = 1.

        Args:
            tokens: [T] int64, `last` or the draft token before.
            states: [T, E_target], the target's state before `last`, or the state that the step before returned.
            positions: [T] int64, the position of `last`: constant through a round, and the number of valid cache rows.
            kv: K and V [N, S, D] of the target's shared layer, by layer type.

        Returns:
            Draft tokens [T] int64 and next states [T, E_target].
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
        kv: dict[str, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """`forward` for tokens that were looked up already, and without the head.

        Args:
            embedded: [T, E_target], scaled.
            window_start: [1] int64, the position that row 0 of sliding layers' buffers holds.

        Returns:
            Hidden states [T, E] and next states [T, E_target].
        """
        text = self.config.text
        x = torch.cat((embedded, states), dim=-1)
        x = self.ops.linear(x, self.pre_projection.weight)
        rotary = {kind: rotary_tables(text.attention(kind), positions) for kind in kv}
        masks = {kind: self._mask(kind, positions, window_start, key.shape[1]) for kind, (key, _) in kv.items()}
        for layer, kind in zip(cast(list[DecoderLayer], self.layers), text.layer_types, strict=True):
            x = layer(x, layer.input_layernorm(x), rotary[kind], masks[kind], *kv[kind])
        hidden = self.norm(x)
        return hidden, self.ops.linear(hidden, self.post_projection.weight)

    def _mask(self, layer_type: str, positions: Tensor, window_start: Tensor, rows: int) -> Tensor:
        """Visible keys: rows before `last`. Its own K/V and those of rejected drafts are never seen.

        The reference measures the window from the newest cache row and includes both ends: window + 1 keys.
        """
        sliding = layer_type == "sliding_attention"
        behind = positions.unsqueeze(1) - (torch.arange(rows) + (window_start if sliding else 0))
        visible = behind >= 1
        if sliding:
            visible &= behind <= self.config.text.sliding_window + 1
        heads = self.config.text.num_attention_heads // self.config.text.attention(layer_type).num_key_value_heads
        return additive_mask(visible, heads)
