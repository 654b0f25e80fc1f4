"""Generation settings of a checkpoint: its special tokens, its sampling defaults and its chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint.config_json import checkpoint_json
from runtime_ref.chat import CHAT_TEMPLATE, parse_template
from runtime_ref.errors import InputError
from runtime_ref.sampling import MAX_TOP_K, Sampling

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens.

    Attributes:
        bos: starts a text.
        eos: any of them ends a text; ascending.
        pad: fills up a batch.
    """

    bos: int
    eos: tuple[int, ...]
    pad: int


def special_tokens(directory: Path) -> SpecialTokens:
    """Read the special tokens of a checkpoint directory.

    Each id is read from generation_config.json, else from config.json, else from its text_config.

    Raises:
        InputError: a file is not a JSON object, or a value is not a token id.
    """
    config = checkpoint_json(directory, "config.json")
    sources = [checkpoint_json(directory, GENERATION_CONFIG), config, config.get("text_config") or {}]

    def token_ids(key: str, default: int) -> list[int]:
        # An id beyond the vocabulary is no error: it never occurs, as in models with a vocabulary that was cut down.
        value = next((source[key] for source in sources if source.get(key) is not None), default)
        ids: list[Any] = value if isinstance(value, list) and value else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise InputError(
                    f"{directory}: {key} is {token!r}, expected a token id or a list of them; correct"
                    f" {GENERATION_CONFIG} or config.json"
                )
        return ids

    bos, eos, pad = token_ids("bos_token_id", 2), token_ids("eos_token_id", 1), token_ids("pad_token_id", 0)
    return SpecialTokens(bos[0], tuple(sorted(set(eos))), pad[0])


def default_sampling(directory: Path) -> Sampling:
    """Read the sampling defaults of a checkpoint directory: greedy without `do_sample`, as in transformers.

    Raises:
        InputError: the file is not a JSON object, a value is impossible, or top_k is higher than a bundle supports.
    """
    settings, path = checkpoint_json(directory, GENERATION_CONFIG), directory / GENERATION_CONFIG

    def number(key: str, default: float) -> float:
        value = default if settings.get(key) is None else settings[key]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InputError(f"{path}: {key} is {value!r}, expected a number; correct the file")
        return value

    samples = settings.get("do_sample")
    if samples not in (None, False, True):
        raise InputError(f"{path}: do_sample is {samples!r}, expected true or false; correct the file")
    temperature, top_p = number("temperature", 1.0), number("top_p", 1.0)
    top_k = number("top_k", MAX_TOP_K) or MAX_TOP_K  # 0 switches top-k off
    if not float(top_k).is_integer():
        raise InputError(f"{path}: top_k is {top_k}, expected a whole number; correct the file")
    try:
        return Sampling(float(temperature) if samples else 0.0, float(top_p), top_k=int(top_k))
    except InputError as error:
        raise InputError(f"{path}: {error}; correct the file") from error


def chat_template(directory: Path) -> str | None:
    """Read the chat template of a checkpoint directory.

    Returns:
        The text of chat_template.jinja, else the template in tokenizer_config.json; None if there is neither.

    Raises:
        InputError: a file cannot be read, or does not hold a chat template.
    """
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); correct or remove it") from error
        parse_template(text, str(path), "correct or remove it")
        return text
    path = directory / TOKENIZER_CONFIG
    template = checkpoint_json(directory, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several templates by name, as transformers used to save them
        defaults = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = defaults[0].get("template") if defaults else template
    if template is None:
        return None
    if not isinstance(template, str):
        raise InputError(
            f"{path}: chat_template is {template!r:.60}, expected text or a list with a template named default;"
            " correct or remove it"
        )
    parse_template(template, f"{path}: chat_template", "correct or remove it")
    return template
