"""Special tokens of a checkpoint: what begins and ends a text, what is never generated, and the marks of thoughts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.generation_config import GENERATION_CONFIG, generation_settings
from exporter.checkpoint.side_files import TOKENIZER_CONFIG, added_tokens, chat_template, checkpoint_json
from exporter.checkpoint.template_marks import end_of_turn, thought_marks
from exporter.checkpoint.template_parts import after_call, call_form, call_marks, thought_form
from exporter.modeling.target import SUPPRESSED_LOGIT
from exporter.modeling.weights import Weights
from runtime_ref.chat import CHAT_TEMPLATE, ChatTemplate
from runtime_ref.errors import InputError
from runtime_ref.text_parts import THOUGHT, TOOL_CALL

# Keys of tokenizer_config.json whose tokens end a text.
END_KEYS = ("eos_token", "eot_token")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens.

    Attributes:
        bos: starts a text.
        eos: any of them ends a text; ascending.
        pad: fills up a batch.
        suppressed: never generated; ascending.
        channels: what begins and what ends a part of the text that is no answer, by the part's name: `thought` and
            `tool_call`.
        parts: what such a part has around its content, and how calls are written, by the part's name.
        names: texts by the names under which chat templates know them, such as `bos_token`.
    """

    bos: int
    eos: tuple[int, ...]
    pad: int
    suppressed: tuple[int, ...] = ()
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def special_tokens(directory: Path) -> tuple[SpecialTokens, tuple[str, ...]]:
    """Read the special tokens of a checkpoint directory.

    Each id is read from generation_config.json, else from config.json, else from its text_config. If the first does not
    say what ends a text, then so do the end tokens in tokenizer_config.json and what the chat template writes after an
    answer.

    Returns:
        The tokens, and in a line each what is odd about them.

    Raises:
        InputError: a file is not a JSON object, a tokenizer or a chat template, or a value is not a token id.
    """
    config, generation = checkpoint_json(directory, "config.json"), checkpoint_json(directory, GENERATION_CONFIG)
    text_config = config.get("text_config")
    sources = [generation, config, text_config if isinstance(text_config, dict) else {}]

    def token_ids(key: str, default: int) -> list[int]:
        found = (_token_ids(directory, key, source.get(key)) for source in sources)
        return next((ids for ids in found if ids), [default])

    path, settings = generation_settings(directory)
    suppressed = tuple(sorted(set(_token_ids(directory, "suppress_tokens", settings.get("suppress_tokens")))))
    bos, eos, pad = token_ids("bos_token_id", 2), token_ids("eos_token_id", 1), token_ids("pad_token_id", 0)
    names = _names(directory)
    added, template = added_tokens(directory), _template(directory, names)
    marks, parts, ends = _parts(template, added) if template else ({}, {}, {})
    if not _token_ids(directory, "eos_token_id", generation.get("eos_token_id")):
        eos += [added[names[key]] for key in END_KEYS if names.get(key) in added]
        eos += ends
    warnings = [*_no_tokens(path, settings)]
    for token, what in ends.items():
        if token not in eos:
            warnings.append(
                f"{path}: eos_token_id lacks {token}, which the chat template writes after {what}; answers go on after"
                " it"
            )
    channels = {name: (added[begin], added[end]) for name, (begin, end) in marks.items()}
    return SpecialTokens(bos[0], tuple(sorted(set(eos))), pad[0], suppressed, channels, parts, names), tuple(warnings)


def _parts(
    template: ChatTemplate, added: Mapping[str, int]
) -> tuple[dict[str, tuple[str, str]], dict[str, dict[str, str]], dict[int, str]]:
    """What a chat template tells about answers.

    Returns:
        The marks of each channel and its form, by its name; and the tokens that end an answer, with what each follows.
    """
    thought, call = thought_marks(template, added), call_marks(template, added)
    marks = {name: pair for name, pair in ((THOUGHT, thought), (TOOL_CALL, call)) if pair}
    forms = {
        THOUGHT: thought_form(template, *thought) if thought else None,
        TOOL_CALL: call_form(template, *call) if call else None,
    }
    ends = {after_call(template, added, call[1]) if call else None: "a call of a tool"}
    ends[end_of_turn(template, added)] = "an answer"
    found = {token: what for token, what in ends.items() if token is not None}
    return marks, {name: form for name, form in forms.items() if form}, found


def suppression(tokens: SpecialTokens, vocab_size: int) -> Weights:
    """Return a reader of `Target`'s parameter `suppressed`, by that name; nothing if no token is suppressed.

    Args:
        tokens: the checkpoint's special tokens.
        vocab_size: V. Ids beyond it never occur.
    """

    def read() -> Tensor:
        added = torch.zeros(vocab_size)
        added[[token for token in tokens.suppressed if token < vocab_size]] = SUPPRESSED_LOGIT
        return added

    return {"suppressed": read} if tokens.suppressed else {}


def _no_tokens(path: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each id of a file's settings by which it says "none"."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"):
        values = settings.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int) and value < 0:
                yield f"{path}: {key} is {value}, which is no token; it is ignored"


def _token_ids(directory: Path, key: str, value: Any) -> list[int]:
    """The token ids of a value, a list or one; negative ids, by which some tools say "none", are left out."""
    # An id beyond the vocabulary is no error: it never occurs, as in models with a vocabulary that was cut down.
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or abs(token) >= 2**31:
            raise InputError(
                f"{directory}: {key} is {token!r:.60}, expected a token id or a list of them; correct"
                f" {GENERATION_CONFIG} or config.json"
            )
    return [token for token in ids if token >= 0]


def _names(directory: Path) -> dict[str, str]:
    """Texts of special tokens by name, as templates in transformers see them; tokenizer_config.json comes first."""
    config, older = checkpoint_json(directory, TOKENIZER_CONFIG), checkpoint_json(directory, "special_tokens_map.json")
    more = [config.get(key) for key in ("extra_special_tokens", "model_specific_special_tokens")]
    names: dict[str, str] = {}
    for source in (older, *(part for part in reversed(more) if isinstance(part, dict)), config):
        for key, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                names[key] = text
    return names


def _template(directory: Path, names: Mapping[str, str]) -> ChatTemplate | None:
    source = chat_template(directory)
    return ChatTemplate(source, str(directory / CHAT_TEMPLATE), "correct it", names) if source else None
