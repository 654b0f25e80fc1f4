"""What a checkpoint says of generating text: its special tokens, and how its tokens are to be chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint import checkpoint_json
from runtime_ref.errors import InputError
from runtime_ref.sampling import LARGEST_TOP_K, Sampling

FILE = "generation_config.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that start a text, end it (any of them), and fill it up."""

    bos: int
    eos: tuple[int, ...]
    pad: int


def special_tokens(directory: Path) -> SpecialTokens:
    """From generation_config.json, else from config.json, else from its text_config, key by key."""
    whole = checkpoint_json(directory, "config.json")
    sources = [checkpoint_json(directory, FILE), whole, whole.get("text_config") or {}]

    def find(key: str, default: int) -> list[int]:
        """A token id, or a list of them; one beyond the vocabulary just never occurs, as in cut-down models."""
        found = next((source[key] for source in sources if source.get(key) is not None), default)
        ids: list[Any] = found if isinstance(found, list) and found else [found]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise InputError(f"{directory}: {key} is {token!r}, expected a token id or a list of them")
        return ids

    bos, eos, pad = find("bos_token_id", 2), find("eos_token_id", 1), find("pad_token_id", 0)
    return SpecialTokens(bos[0], tuple(sorted(set(eos))), pad[0])


def default_sampling(directory: Path) -> Sampling:
    """How generation_config.json has tokens chosen: greedily unless it says `do_sample`, as in transformers.

    Raises:
        InputError: a value is impossible, or asks for more than the logits that a bundle gives.
    """
    found, path = checkpoint_json(directory, FILE), directory / FILE

    def number(key: str, default: float) -> float:
        value = default if found.get(key) is None else found[key]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InputError(f"{path}: {key} is {value!r}, expected a number; correct the file")
        return value

    samples = found.get("do_sample")
    if samples not in (None, False, True):
        raise InputError(f"{path}: do_sample is {samples!r}, expected true or false; correct the file")
    temperature, top_p = number("temperature", 1.0), number("top_p", 1.0)
    top_k = number("top_k", LARGEST_TOP_K) or LARGEST_TOP_K  # 0 is one that is switched off
    if not float(top_k).is_integer():
        raise InputError(f"{path}: top_k is {top_k}, expected a whole number; correct the file")
    try:
        return Sampling(float(temperature) if samples else 0.0, float(top_p), top_k=int(top_k))
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the file") from error
