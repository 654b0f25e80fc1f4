"""The published sizes of E2B, E4B and their drafters, and the config.json files that describe them."""

from dataclasses import asdict, replace
from typing import Any

from exporter.modeling.config import LAYER_TYPES, AttentionConfig, DrafterConfig, TextConfig

SLIDING, FULL = LAYER_TYPES

E2B = TextConfig(
    vocab_size=262144,
    hidden_size=1536,
    intermediate_size=6144,
    num_hidden_layers=35,
    num_attention_heads=8,
    layer_types=((SLIDING,) * 4 + (FULL,)) * 7,
    sliding_attention=AttentionConfig(256, 1, 1e4),
    full_attention=AttentionConfig(512, 1, 1e6, "proportional", 0.25),
    sliding_window=512,
    rms_norm_eps=1e-6,
    num_kv_shared_layers=20,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262144,
    final_logit_softcapping=30.0,
    max_position_embeddings=131072,
)
E4B = replace(
    E2B,
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=42,
    layer_types=((SLIDING,) * 5 + (FULL,)) * 7,
    sliding_attention=replace(E2B.sliding_attention, num_key_value_heads=2),
    full_attention=replace(E2B.full_attention, num_key_value_heads=2),
    num_kv_shared_layers=18,
    use_double_wide_mlp=False,
)


def drafter_of(target: TextConfig) -> DrafterConfig:
    """Return the configuration of the drafter that is published with E2B or E4B.

    Args:
        target: `E2B` or `E4B`.
    """
    text = replace(
        target,
        hidden_size=256,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=4,
        layer_types=(SLIDING,) * 3 + (FULL,),
        num_kv_shared_layers=4,
        use_double_wide_mlp=False,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=None,
    )
    return DrafterConfig(text, target.hidden_size, num_centroids=2048, centroid_intermediate_top_k=32)


SIZES = {"e2b": (E2B, drafter_of(E2B)), "e4b": (E4B, drafter_of(E4B))}


def target_json(config: TextConfig) -> dict[str, Any]:
    """Return the content of a target's config.json; `read_target_config` is the inverse.

    Args:
        config: a target whose layer types have the same number of KV heads.
    """
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "tie_word_embeddings": True,
        "text_config": _text_json(config),
    }


def drafter_json(config: DrafterConfig) -> dict[str, Any]:
    """Return the content of a drafter's config.json; `read_drafter_config` is the inverse.

    Args:
        config: a drafter with clusters, whose layer types have the same number of KV heads.
    """
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "tie_word_embeddings": True,
        "backbone_hidden_size": config.backbone_hidden_size,
        "use_ordered_embeddings": True,
        "num_centroids": config.num_centroids,
        "centroid_intermediate_top_k": config.centroid_intermediate_top_k,
        "text_config": _text_json(config.text),
    }


def _text_json(config: TextConfig) -> dict[str, Any]:
    sizes = {layer_type: config.attention(layer_type) for layer_type in LAYER_TYPES}
    rope: dict[str, dict[str, Any]] = {
        layer_type: {"rope_type": attention.rope_type, "rope_theta": attention.rope_theta}
        for layer_type, attention in sizes.items()
    }
    rope[FULL]["partial_rotary_factor"] = sizes[FULL].partial_rotary_factor
    plain = {key: value for key, value in asdict(config).items() if key not in LAYER_TYPES}
    if not config.hidden_size_per_layer_input:
        plain["vocab_size_per_layer_input"] = 0
    return plain | {
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "head_dim": sizes[SLIDING].head_dim,
        "global_head_dim": sizes[FULL].head_dim,
        "num_key_value_heads": sizes[SLIDING].num_key_value_heads,
        "rope_parameters": rope,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
