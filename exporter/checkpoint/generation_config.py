"""Sampling defaults of a checkpoint, from its generation_config.json, and what of that file a bundle cannot do."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.checkpoint.side_files import checkpoint_json
from runtime_ref.errors import InputError
from runtime_ref.sampling import MAX_TOP_K, Sampling

GENERATION_CONFIG = "generation_config.json"
DEFAULT_TOP_K = 50  # of transformers, where a file that samples does not say

# Keys of transformers 5.24.0 that are read here or as special tokens.
READ_KEYS = frozenset(
    "do_sample temperature top_k top_p bos_token_id eos_token_id pad_token_id suppress_tokens".split()
)
# Keys that change which tokens are generated, and that the runtimes do not have; other values than these are warned of.
UNSUPPORTED_KEYS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "stop_strings"), ([],)),
    **dict.fromkeys(("sequence_bias", "constraints"), ([], {})),
    **dict.fromkeys(("top_h", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("watermarking_config", "dola_layers", "max_time", "token_healing"), (False,)),
}
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


def default_sampling(directory: Path) -> Sampling:
    """Read the sampling defaults of a checkpoint directory: greedy without `do_sample`, as in transformers.

    A `top_k` that a bundle cannot do becomes the largest that it can; `generation_warnings` says so.

    Raises:
        InputError: the file is not a JSON object, or a value is impossible.
    """
    settings, path = checkpoint_json(directory, GENERATION_CONFIG), directory / GENERATION_CONFIG

    def number(key: str, default: float) -> float:
        value = default if settings.get(key) is None else settings[key]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InputError(f"{path}: {key} is {value!r}, expected a number; correct the file")
        return value

    samples = settings.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise InputError(f"{path}: do_sample is {samples!r}, expected true or false; correct the file")
    temperature, top_p, top_k = (
        number("temperature", 1.0),
        number("top_p", 1.0),
        number("top_k", DEFAULT_TOP_K if samples else MAX_TOP_K),
    )
    if not float(top_k).is_integer() or top_k < 0:
        raise InputError(f"{path}: top_k is {top_k}, expected a whole number that is not negative; correct the file")
    try:
        return Sampling(
            float(temperature) if samples else 0.0, float(top_p), top_k=min(int(top_k) or MAX_TOP_K, MAX_TOP_K)
        )
    except (InputError, OverflowError) as error:
        raise InputError(f"{path}: {error}; correct the file") from error


def generation_warnings(directory: Path) -> Iterator[str]:
    """Yield, in a line each, what generation_config.json asks for and a bundle does not do.

    Raises:
        InputError: the file is not a JSON object.
    """
    settings, path = checkpoint_json(directory, GENERATION_CONFIG), directory / GENERATION_CONFIG
    for key, value in settings.items():
        if key in UNSUPPORTED_KEYS and value is not None and value not in UNSUPPORTED_KEYS[key]:
            yield f"{path}: {key} is {value!r:.60}, which runtimes do not have yet; tokens are chosen without it"
        elif key not in UNSUPPORTED_KEYS and key not in READ_KEYS and key not in IGNORED_KEYS:
            yield f"{path}: {key} is not a key that transformers knows; it is ignored"
    top_k = settings.get("top_k")
    if settings.get("do_sample") and isinstance(top_k, int | float) and not 0 < top_k <= MAX_TOP_K:
        yield f"{path}: top_k is {top_k}; a bundle gives {MAX_TOP_K} logits of a token, so tokens are chosen from these"
