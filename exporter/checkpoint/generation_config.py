"""Sampling defaults of a checkpoint, from its generation_config.json, and what of that file a bundle cannot do."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.side_files import checkpoint_json
from runtime_ref.errors import InputError
from runtime_ref.pointers import is_present
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


def generation_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Read the settings of a checkpoint's generation.

    Without generation_config.json they are those keys of config.json, as in transformers: of the whole, then of its
    text_config.

    Returns:
        The file that they are from, and their values by key.

    Raises:
        InputError: a file is not a JSON object.
    """
    path = directory / GENERATION_CONFIG
    if is_present(path):
        return path, checkpoint_json(directory, GENERATION_CONFIG)
    config = checkpoint_json(directory, "config.json")
    text = config.get("text_config")
    sections = (text, config) if isinstance(text, dict) else (config,)
    found = {
        key: value
        for section in sections
        for key, value in section.items()
        if value is not None and (key in READ_KEYS or key in UNSUPPORTED_KEYS)
    }
    return directory / "config.json", found


def default_sampling(directory: Path) -> Sampling:
    """Read the sampling defaults of a checkpoint directory: greedy without `do_sample`, as in transformers.

    A `top_k` that a bundle cannot do becomes the largest that it can; `generation_warnings` says so.

    Raises:
        InputError: a file is not a JSON object, or a value that is used is impossible.
    """
    path, settings = generation_settings(directory)
    samples = settings.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise InputError(f"{path}: do_sample is {samples!r:.60}, expected true or false; correct the file")
    try:
        top_k = _top_k(path, settings, DEFAULT_TOP_K if samples else MAX_TOP_K)
        cuts = Sampling(_number(path, settings, "temperature"), _number(path, settings, "top_p"), top_k=top_k)
    except InputError as error:
        if not samples:  # greedy decoding reads none of these
            return Sampling()
        origin = "" if str(error).startswith(str(path)) else f"{path}: "
        raise InputError(f"{origin}{error}; correct the file") from error
    return cuts if samples else replace(cuts, temperature=0.0)


def generation_warnings(directory: Path) -> Iterator[str]:
    """Yield, in a line each, what a checkpoint's generation settings ask for and a bundle does not do.

    Raises:
        InputError: a file is not a JSON object.
    """
    path, settings = generation_settings(directory)
    for key, value in settings.items():
        if value is None or (key in SAMPLING_KEYS and not settings.get("do_sample")):
            continue
        if key in UNSUPPORTED_KEYS and value not in UNSUPPORTED_KEYS[key]:
            yield f"{path}: {key} is {value!r:.60}, which runtimes do not have yet; tokens are chosen without it"
        elif key not in UNSUPPORTED_KEYS and key not in READ_KEYS and key not in IGNORED_KEYS:
            yield f"{path}: {key} is not a key that transformers knows; it is ignored"
    top_k = settings.get("top_k")
    if settings.get("do_sample") and isinstance(top_k, int | float) and not 0 < top_k <= MAX_TOP_K:
        yield (
            f"{path}: top_k is {top_k!r:.60}; a bundle gives {MAX_TOP_K} logits of a token, and one of these is chosen"
        )


def _number(path: Path, settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise InputError(f"{path}: {key} is {value!r:.60}, expected a number")
    return float(value)


def _top_k(path: Path, settings: Mapping[str, Any], default: int) -> int:
    """The number of logits to choose from, at most `MAX_TOP_K`; 0, and -1 in other programs, mean all of them."""
    value = settings.get("top_k")
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{path}: top_k is {value!r:.60}, expected a number")
    if value in (0, -1):
        return MAX_TOP_K
    if value < 0 or (isinstance(value, float) and not value.is_integer()):
        raise InputError(f"{path}: top_k is {value!r:.60}, expected a whole number that is not negative")
    return int(min(value, MAX_TOP_K))
