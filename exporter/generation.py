"""What a checkpoint says of generating text: its special tokens, and how its tokens are to be chosen,
and how a chat is put to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint import checkpoint_json
from runtime_ref.chat import CHAT_TEMPLATE, parse_template
from runtime_ref.errors import InputError
from runtime_ref.sampling import MAX_TOP_K, Sampling

FILE = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


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
    top_k = number("top_k", MAX_TOP_K) or MAX_TOP_K  # 0 is one that is switched off
    if not float(top_k).is_integer():
        raise InputError(f"{path}: top_k is {top_k}, expected a whole number; correct the file")
    try:
        return Sampling(float(temperature) if samples else 0.0, float(top_p), top_k=int(top_k))
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the file") from error


def chat_template(directory: Path) -> str | None:
    """The chat template of chat_template.jinja, else of tokenizer_config.json, if there is any.

    Raises:
        InputError: it is of another type, or no template.
    """
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        try:
            found = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); correct or remove it") from error
        parse_template(found, str(path), "correct or remove it")
        return found
    path = directory / TOKENIZER_CONFIG
    template = checkpoint_json(directory, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several by name, as transformers once saved them
        named = [part for part in template if isinstance(part, dict) and part.get("name") == "default"]
        template = named[0].get("template") if named else template
    if template is None:
        return None
    if not isinstance(template, str):
        raise InputError(
            f"{path}: chat_template is {template!r:.60}, expected text or a list with a template named default;"
            " correct or remove it"
        )
    parse_template(template, f"{path}: chat_template", "correct or remove it")
    return template
