"""Files that a checkpoint may have beside its weights: settings, the tokenizer and the chat template."""

import json
from pathlib import Path
from typing import Any

from exporter.checkpoint.values import read_object
from runtime_ref.chat import CHAT_TEMPLATE, parse_template
from runtime_ref.errors import InputError
from runtime_ref.pointers import is_present, what_stands_for
from runtime_ref.tokenizer import TOKENIZER, read_tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
# Other forms of a tokenizer, which runtimes do not read.
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json")
# JSON files that hold a chat template where chat_template.jinja is missing, the first that has one applies.
TEMPLATE_FILES = ("chat_template.json", "processor_config.json", TOKENIZER_CONFIG)


def checkpoint_json(directory: Path, name: str) -> dict[str, Any]:
    """Parse an optional JSON file of a checkpoint; an empty object if it does not exist.

    Args:
        directory: the checkpoint's directory.
        name: the file's name in it.

    Raises:
        InputError: the file is only a pointer to its content, not JSON, or holds no object.
    """
    path = directory / name
    return read_object(path) if is_present(path) else {}


def added_tokens(directory: Path) -> dict[str, int]:
    """Return ids of the tokens that a checkpoint's tokenizer adds to its vocabulary, by text; none without a tokenizer.

    Raises:
        InputError: tokenizer.json is only a pointer to its content, or no tokenizer; or there is a tokenizer in another
            form alone.
    """
    path = directory / TOKENIZER
    if is_present(path):
        tokenizer = read_tokenizer(path, "restore it, or remove it for a bundle that takes token ids alone")
        return {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    other = next((name for name in OTHER_TOKENIZERS if is_present(directory / name)), None)
    if other is not None:
        raise InputError(
            f"{directory / other}: a tokenizer in this form alone cannot be bundled, expected {TOKENIZER} beside it;"
            " save it with transformers (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or remove it for a"
            " bundle that takes token ids alone"
        )
    return {}


def chat_template(directory: Path) -> str | None:
    """Read the chat template of a checkpoint directory.

    Returns:
        The text of chat_template.jinja, else the first template in one of `TEMPLATE_FILES`; None if there is none.

    Raises:
        InputError: a file is only a pointer to its content, cannot be read, or does not hold a chat template.
    """
    path = directory / CHAT_TEMPLATE
    if is_present(path):
        if (instead := what_stands_for(path)) is not None:
            raise InputError(f"{path}: is {instead}")
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); correct or remove it") from error
        parse_template(text, str(path), "correct or remove it")
        return text
    for name in TEMPLATE_FILES:
        template = _default_template(checkpoint_json(directory, name).get("chat_template"))
        if template is None:
            continue
        origin = f"{directory / name}: chat_template"
        if not isinstance(template, str):
            raise InputError(
                f"{origin} is {json.dumps(template)[:60]}, expected text or templates by name with one named default;"
                " correct or remove it"
            )
        parse_template(template, origin, "correct or remove it")
        return template
    return None


def _default_template(stored: Any) -> Any:
    """The template that a file's value stands for; several templates by name are lists of objects, or an object."""
    if isinstance(stored, list):
        defaults = [entry for entry in stored if isinstance(entry, dict) and entry.get("name") == "default"]
        return defaults[0].get("template") if defaults else stored
    return stored.get("default", stored) if isinstance(stored, dict) else stored
