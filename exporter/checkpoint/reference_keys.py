"""The keys of a config.json that transformers 5.24.0 reads, by its config classes; a test compares them with these."""

# Of every config.
_COMMON = frozenset(
    """transformers_version architectures output_hidden_states return_dict dtype chunk_size_feed_forward
    is_encoder_decoder id2label label2id problem_type""".split()
)

# `Gemma4TextConfig`, and what its code reads besides its fields.
TEXT_KEYS = _COMMON | frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_activation max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id eos_token_id
    bos_token_id tie_word_embeddings rope_parameters attention_bias attention_dropout sliding_window layer_types
    final_logit_softcapping use_bidirectional_attention vocab_size_per_layer_input hidden_size_per_layer_input
    attention_k_eq_v num_kv_shared_layers enable_moe_block use_double_wide_mlp num_experts top_k_experts
    moe_intermediate_size""".split()
)
TEXT_KEYS_OF_CODE = frozenset(
    """global_head_dim num_global_key_value_heads per_layer_config rope_scaling partial_rotary_factor
    original_max_position_embeddings is_causal""".split()
)

# `Gemma4Config`, outside of its text_config.
TARGET_KEYS = _COMMON | frozenset(
    """text_config vision_config audio_config boi_token_id eoi_token_id image_token_id video_token_id boa_token_id
    eoa_token_index audio_token_id initializer_range tie_word_embeddings""".split()
)

# `Gemma4AssistantConfig`, outside of its text_config.
DRAFTER_KEYS = _COMMON | frozenset(
    """text_config backbone_hidden_size use_ordered_embeddings num_centroids centroid_intermediate_top_k
    tie_word_embeddings""".split()
)
