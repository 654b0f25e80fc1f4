"""Sampling defaults of a checkpoint, from its generation_config.json, and what of that file a bundle cannot do."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.generation_keys import IGNORED_KEYS, READ_KEYS, SAMPLING_KEYS, UNSUPPORTED_KEYS
from exporter.checkpoint.side_files import checkpoint_json
from runtime_ref.errors import InputError
from runtime_ref.pointers import is_present
from runtime_ref.rules import Rules
from runtime_ref.sampling import MAX_TOP_K, Sampling

GENERATION_CONFIG = "generation_config.json"
DEFAULT_TOP_K = 50  # of transformers, where a file that samples does not say


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
        raise _of_file(path, error) from error
    return cuts if samples else replace(cuts, temperature=0.0)


def default_repetition_penalty(directory: Path) -> float:
    """Read the repetition penalty of a checkpoint directory, greedy or not, as in transformers; 1 is none.

    Raises:
        InputError: a file is not a JSON object, or the value is impossible.
    """
    path, settings = generation_settings(directory)
    try:
        return Rules(repetition_penalty=_number(path, settings, "repetition_penalty")).repetition_penalty
    except InputError as error:
        raise _of_file(path, error) from error


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


def _of_file(path: Path, error: InputError) -> InputError:
    """An error about a value, which names the file that has it."""
    origin = "" if str(error).startswith(str(path)) else f"{path}: "
    return InputError(f"{origin}{error}; correct the file")


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
