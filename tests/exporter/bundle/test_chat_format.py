"""A chat format gives the same prompts as its template; templates for which that is impossible get no format."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from exporter.bundle.chat_format import ChatFormat
from exporter.bundle.plain_chat import PlainChat, plain_chat
from exporter.checkpoint.special_tokens import SpecialTokens
from exporter.demo import PAIR
from runtime_ref.chat import Message, open_template
from runtime_ref.tokenizer import TextTokenizer
from tests.chats import CHANNELS, TEMPLATE, VERBATIM

TOKENS = SpecialTokens(2, (1,), 0)
TURNS = {
    "system": ("<|turn>system\n", "<turn|>\n"),
    "user": ("<|turn>user\n", "<turn|>\n"),
    "assistant": ("<|turn>model\n", "<turn|>\n"),
}
ANSWER = "<|turn>model\n"
BRACKETS = {"user": ("[user] ", "[end]\n"), "assistant": ("[assistant] ", "[end]\n")}
FORMATS = {
    "turns": (TEMPLATE, ChatFormat("<bos>", TURNS, ANSWER, trim=True, alternate=True, hidden=None)),
    "channels": (
        CHANNELS,
        ChatFormat(
            "<bos>", TURNS, f"{ANSWER}<|channel>thought\n<channel|>", True, True, hidden=("<|channel>", "<channel|>")
        ),
    ),
    "verbatim": (VERBATIM, ChatFormat("", BRACKETS, "[assistant] ", trim=False, alternate=False, hidden=None)),
    "system not trimmed": (
        TEMPLATE.replace("turn('system', messages[0]['content'])", "'<|turn>system\\n' ~ messages[0]['content']"),
        ChatFormat(
            "<bos>", {role: turn for role, turn in TURNS.items() if role != "system"}, ANSWER, True, True, hidden=None
        ),
    ),
}
BRACKETED_MESSAGE = "[{{ message.role }}] {{ message.content }}[end]"
TEMPLATES_WITHOUT_FORMAT = {
    "first message trimmed": (
        "{{ message.content }}",
        "{{ message.content | trim if loop.first else message.content }}",
    ),
    "lower case": ("{{ message.content }}", "{{ message.content | lower }}"),
    "escaped": ("{{ message.content }}", "{{ message.content | e }}"),
    "only ASCII whitespace trimmed": ("{{ message.content }}", "{{ message.content.strip(' \\n\\r\\t') }}"),
    "empty messages left out": (BRACKETED_MESSAGE, "{% if message.content %}" + BRACKETED_MESSAGE + "{% endif %}"),
    "only what comes after thinking": ("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}"),
    "thinking of the last turn kept": (
        "{{ message.content }}",
        "{{ message.content if loop.revindex < 3 else message.content.split('<think>')[0] }}",
    ),
    "numbered": ("[{{ message.role }}]", "[{{ message.role }} {{ loop.index }}]"),
    "content twice": ("{{ message.content }}", "{{ message.content }}{{ message.content }}"),
    "dated": ("[end]", "[end]{{ strftime_now('%Y') }}"),
    "refuses all": ("[end]", "{{ raise_exception('no') }}"),
}


@pytest.fixture
def templated(tmp_path: Path) -> Callable[[str], Path]:
    """Make a directory with a tokenizer and a template."""

    def make(template: str) -> Path:
        shutil.copyfile(PAIR / "target" / "tokenizer.json", tmp_path / "tokenizer.json")
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


def chats(form: ChatFormat, pieces: Sequence[str]) -> list[list[Message]]:
    """Return random chats that fit a format; in the first, all contents are empty."""
    generator = random.Random(1)
    result: list[list[Message]] = []
    for number in range(150):
        roles = [("user", "assistant")[i % 2] for i in range(2 * generator.randrange(6) + 1)]
        if not form.alternate:
            generator.shuffle(roles)
        if "system" in form.turns and number % 2:
            roles.insert(0, "system")
        length = 12 if number else 1
        contents = ["".join(generator.choices(pieces, k=generator.randrange(length))) for _ in roles]
        result.append([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, templated: Callable[[str], Path]) -> None:
    template, form = FORMATS[name]
    directory = templated(template)
    assert plain_chat(directory, TOKENS).chat == form
    rendered = open_template(directory, TextTokenizer(directory, TOKENS)).render
    pieces = ["x", " ", "\n", "\u00a0", "\x1c", "\u200b", "<bos>", "<turn|>", "<|channel>", "<channel|>", "[end]"]
    for messages in chats(form, pieces):
        assert form.render(messages) == rendered(messages)


@pytest.mark.parametrize("name", TEMPLATES_WITHOUT_FORMAT)
def test_no_format(name: str, templated: Callable[[str], Path]) -> None:
    old, new = TEMPLATES_WITHOUT_FORMAT[name]
    assert old in VERBATIM
    assert plain_chat(templated(VERBATIM.replace(old, new)), TOKENS).chat is None


def test_no_format_without_a_tokenizer(templated: Callable[[str], Path]) -> None:
    directory = templated(VERBATIM)
    (directory / "tokenizer.json").write_text("{}")
    assert plain_chat(directory, TOKENS) == PlainChat()
    (directory / "tokenizer.json").unlink()
    assert plain_chat(directory, TOKENS) == PlainChat()


def test_manifest_has_the_format(chat_bundle: Path, bundle: Callable[[str], Path]) -> None:
    actual = json.loads((chat_bundle / "manifest.json").read_text())["chat"]
    assert actual == json.loads(json.dumps(asdict(FORMATS["turns"][1])))
    assert "chat" not in json.loads((bundle("dense") / "manifest.json").read_text())
