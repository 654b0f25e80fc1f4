"""Frozen configurations of a target and a drafter, with the field names of the checkpoint."""

from dataclasses import dataclass

LAYER_TYPES = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class AttentionConfig:
    """What the layers of one type share: head sizes and rotary embedding."""

    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    rope_factor: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """A Gemma 4 text decoder: the target, or the inner model of a drafter (field names as in the checkpoint)."""

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
        return self.full_attention if layer_type == "full_attention" else self.sliding_attention

    @property
    def num_kv_layers(self) -> int:
        """Leading layers that compute and store K/V; the layers after them read a stored one."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def kv_source(self, layer_type: str) -> int:
        """Index of the layer whose stored K/V the KV-shared layers (and the drafter) of this type read."""
        stored = self.layer_types[: self.num_kv_layers]
        return len(stored) - 1 - stored[::-1].index(layer_type)

    def mlp_size(self, layer: int) -> int:
        doubled = self.use_double_wide_mlp and layer >= self.num_kv_layers
        return self.intermediate_size * (2 if doubled else 1)


@dataclass(frozen=True)
class DrafterConfig:
    """An MTP drafter: its inner decoder, and what ties it to a target."""

    text: TextConfig
    backbone_hidden_size: int
    num_centroids: int
    centroid_intermediate_top_k: int


def shared_kv(target: TextConfig, drafter: DrafterConfig) -> dict[str, int]:
    """Return the target layer whose K and V the drafter's layers of each type read, by layer type."""
    return {layer_type: target.kv_source(layer_type) for layer_type in sorted(set(drafter.text.layer_types))}
