"""Frozen configurations of a target and a drafter, with the field names of the checkpoint."""

from dataclasses import dataclass

LAYER_TYPES = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class AttentionConfig:
    """Head sizes and rotary embedding of the layers of one type.

    Attributes:
        head_dim: size D of a head; even.
        num_key_value_heads: number N of KV heads.
        rope_theta: base of the rotary frequencies.
        rope_type: "default", or "proportional" as in transformers.
        partial_rotary_factor: fraction of a head's dimensions that is rotated; read by the proportional type alone.
        rope_factor: divisor of the frequencies; read by the proportional type alone.
    """

    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    rope_factor: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """A Gemma 4 text decoder: the target, or the inner model of a drafter.

    Attributes:
        vocab_size: number V of token ids.
        hidden_size: size E of a hidden state.
        intermediate_size: inner size of the MLPs, before `use_double_wide_mlp`.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number H of query heads, in layers of both types.
        layer_types: one of `LAYER_TYPES` for each layer.
        sliding_attention: head sizes and rotary embedding of sliding layers.
        full_attention: head sizes and rotary embedding of full layers.
        sliding_window: tokens that a query of the target's sliding layers sees, itself included.
        rms_norm_eps: number that RMS norms add to the mean square.
        num_kv_shared_layers: number of last layers that read the K/V of an earlier layer instead of storing their own.
        use_double_wide_mlp: whether the MLPs of KV-shared layers have twice the inner size.
        hidden_size_per_layer_input: size P of a per-layer embedding (PLE); 0 for none.
        vocab_size_per_layer_input: number of token ids that have per-layer embeddings.
        final_logit_softcapping: `cap` in logits = tanh(logits / cap) * cap; None for no softcap.
        max_position_embeddings: longest context in tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_types: tuple[str, ...]
    sliding_attention: AttentionConfig
    full_attention: AttentionConfig
    sliding_window: int
    rms_norm_eps: float
    num_kv_shared_layers: int
    use_double_wide_mlp: bool
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    final_logit_softcapping: float | None
    max_position_embeddings: int

    def attention(self, layer_type: str) -> AttentionConfig:
        """Return the head sizes and rotary embedding of one of `LAYER_TYPES`."""
        return self.full_attention if layer_type == "full_attention" else self.sliding_attention

    @property
    def num_kv_layers(self) -> int:
        """Number of leading layers that compute and store K/V; the layers after them read a stored one."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def kv_source(self, layer_type: str) -> int:
        """Return the index of the layer whose stored K/V the KV-shared layers (and the drafter) of this type read."""
        stored = self.layer_types[: self.num_kv_layers]
        return len(stored) - 1 - stored[::-1].index(layer_type)

    def mlp_size(self, layer: int) -> int:
        """Return the inner size of the MLP of the layer with this index."""
        doubled = self.use_double_wide_mlp and layer >= self.num_kv_layers
        return self.intermediate_size * (2 if doubled else 1)


@dataclass(frozen=True)
class DrafterConfig:
    """A multi-token-prediction (MTP) drafter.

    Attributes:
        text: the drafter's inner decoder.
        backbone_hidden_size: the target's hidden size.
        num_centroids: number C of clusters of the two-stage head.
        centroid_intermediate_top_k: number of clusters that the first stage keeps.
    """

    text: TextConfig
    backbone_hidden_size: int
    num_centroids: int
    centroid_intermediate_top_k: int


def shared_kv(target: TextConfig, drafter: DrafterConfig) -> dict[str, int]:
    """Return the index of the target layer whose K and V the drafter's layers of each type read, by layer type."""
    return {layer_type: target.kv_source(layer_type) for layer_type in sorted(set(drafter.text.layer_types))}
