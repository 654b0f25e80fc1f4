"""A template's plain form gives the prompts that the template gives, and there is none where it would not."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from exporter.bundle.chat_format import ChatFormat, chat_format
from exporter.checkpoint.generation_config import SpecialTokens
from exporter.demo import PAIR
from runtime_ref.chat import ChatTemplate, Message
from runtime_ref.tokenizer import TextTokenizer
from tests.chats import CHANNELS, TEMPLATE, VERBATIM

TOKENS = SpecialTokens(2, (1,), 0)
TURNS = {
    "system": ("<|turn>system\n", "<turn|>\n"),
    "user": ("<|turn>user\n", "<turn|>\n"),
    "assistant": ("<|turn>model\n", "<turn|>\n"),
}
ANSWER = "<|turn>model\n"
SPOKEN = {"user": ("[user] ", "[end]\n"), "assistant": ("[assistant] ", "[end]\n")}
FORMS = {
    "turns": (TEMPLATE, ChatFormat("<bos>", TURNS, ANSWER, trim=True, alternate=True, hidden=None)),
    "channels": (
        CHANNELS,
        ChatFormat(
            "<bos>", TURNS, f"{ANSWER}<|channel>thought\n<channel|>", True, True, hidden=("<|channel>", "<channel|>")
        ),
    ),
    "verbatim": (VERBATIM, ChatFormat("", SPOKEN, "[assistant] ", trim=False, alternate=False, hidden=None)),
    "system as it is": (
        TEMPLATE.replace("turn('system', messages[0]['content'])", "'<|turn>system\\n' ~ messages[0]['content']"),
        ChatFormat(
            "<bos>", {role: turn for role, turn in TURNS.items() if role != "system"}, ANSWER, True, True, hidden=None
        ),
    ),
}
SAID = "[{{ message.role }}] {{ message.content }}[end]"
FORMLESS = {
    "the first trimmed": ("{{ message.content }}", "{{ message.content | trim if loop.first else message.content }}"),
    "lower case": ("{{ message.content }}", "{{ message.content | lower }}"),
    "escaped": ("{{ message.content }}", "{{ message.content | e }}"),
    "only ASCII blanks": ("{{ message.content }}", "{{ message.content.strip(' \\n\\r\\t') }}"),
    "empty ones left out": (SAID, "{% if message.content %}" + SAID + "{% endif %}"),
    "what comes after thinking": ("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}"),
    "thinking of the last turn kept": (
        "{{ message.content }}",
        "{{ message.content if loop.revindex < 3 else message.content.split('<think>')[0] }}",
    ),
    "numbered": ("[{{ message.role }}]", "[{{ message.role }} {{ loop.index }}]"),
    "said twice": ("{{ message.content }}", "{{ message.content }}{{ message.content }}"),
    "dated": ("[end]", "[end]{{ strftime_now('%Y') }}"),
    "refuses all": ("[end]", "{{ raise_exception('no') }}"),
}


@pytest.fixture
def templated(tmp_path: Path) -> Callable[[str], Path]:
    """A directory with a tokenizer and this template."""

    def make(template: str) -> Path:
        shutil.copyfile(PAIR / "target" / "tokenizer.json", tmp_path / "tokenizer.json")
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


def chats(form: ChatFormat, pieces: Sequence[str]) -> list[list[Message]]:
    """Random ones that suit a form; the first is empty but for its roles."""
    generator = random.Random(1)
    found: list[list[Message]] = []
    for number in range(150):
        roles = [("user", "assistant")[i % 2] for i in range(2 * generator.randrange(6) + 1)]
        if not form.alternate:
            generator.shuffle(roles)
        if "system" in form.turns and number % 2:
            roles.insert(0, "system")
        length = 12 if number else 1
        contents = ["".join(generator.choices(pieces, k=generator.randrange(length))) for _ in roles]
        found.append([{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)])
    return found


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, templated: Callable[[str], Path]) -> None:
    template, form = FORMS[name]
    directory = templated(template)
    assert chat_format(directory, TOKENS) == form
    rendered = ChatTemplate(directory, TextTokenizer(directory, TOKENS)).render
    pieces = ["x", " ", "\n", "\u00a0", "\x1c", "\u200b", "<bos>", "<turn|>", "<|channel>", "<channel|>", "[end]"]
    for messages in chats(form, pieces):
        assert form.render(messages) == rendered(messages)


@pytest.mark.parametrize("name", FORMLESS)
def test_no_form(name: str, templated: Callable[[str], Path]) -> None:
    old, new = FORMLESS[name]
    assert old in VERBATIM
    assert chat_format(templated(VERBATIM.replace(old, new)), TOKENS) is None


def test_no_form_without_a_tokenizer(templated: Callable[[str], Path]) -> None:
    directory = templated(VERBATIM)
    (directory / "tokenizer.json").write_text("{}")
    assert chat_format(directory, TOKENS) is None
    (directory / "tokenizer.json").unlink()
    assert chat_format(directory, TOKENS) is None


def test_bundles_say_it(chat_bundle: Path, bundle: Callable[[str], Path]) -> None:
    said = json.loads((chat_bundle / "manifest.json").read_text())["chat"]
    assert said == json.loads(json.dumps(asdict(FORMS["turns"][1])))
    assert "chat" not in json.loads((bundle("dense") / "manifest.json").read_text())
