"""Keys of generation_config.json that transformers 5.24.0 knows, by what becomes of them; a test compares them."""

from collections.abc import Mapping
from typing import Any

# Keys of transformers 5.24.0 that are read: sampling, its penalty, and special tokens.
READ_KEYS = frozenset(
    """do_sample temperature top_k top_p repetition_penalty bos_token_id eos_token_id pad_token_id
    suppress_tokens""".split()
)
# Keys that change which tokens are generated, and that the runtimes do not have; other values than these are warned of.
UNSUPPORTED_KEYS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("encoder_repetition_penalty", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "stop_strings"), ([],)),
    **dict.fromkeys(("sequence_bias", "constraints"), ([], {})),
    **dict.fromkeys(("top_h", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("watermarking_config", "dola_layers", "max_time", "token_healing"), (False,)),
}
# Those of them that only sampling reads.
SAMPLING_KEYS = frozenset(("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"))
# Keys that do not change which tokens are generated, or that say how many, which users of a bundle say themselves.
IGNORED_KEYS = frozenset(
    """max_length max_new_tokens early_stopping use_mtp use_cache cache_implementation cache_config max_cache_len
    length_penalty renormalize_logits remove_invalid_values num_return_sequences output_attentions output_hidden_states
    output_scores output_logits return_dict_in_generate decoder_start_token_id is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
    assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type
    compile_config disable_compile continuous_batching_config low_memory prefill_chunk_size _from_model_config
    transformers_version""".split()
)
