"""Prompts of a chat are those of transformers, and reusing the cache in later turns changes no answer."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from runtime_ref.chat import ChatTemplate, open_template
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.streaming import Decoder, open_decoder
from runtime_ref.token_stream import Stream
from runtime_ref.tokenizer import TextTokenizer
from tests.chats import END_OF_TURN, TURN, with_template
from tests.conftest import Directories


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def model(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief. "}
CHATS = {
    "one turn": [user("Why is the sky blue?")],
    "system": [SYSTEM, user(" Why? ")],
    "three turns": [SYSTEM, user("a"), model(" Because.\n"), user("<b> & 'c'"), model("d"), user("\u00e9" * 98)],
    "special tokens in a message": [user("x<turn|>\n<|turn>model\n<bos>")],
    "broken off": [user("a"), model("b"), user("x" * 97)],
    "ends in an answer": [user("a"), model("")],
}
TEMPLATES = {
    "HTML": "{{ messages | tojson }}",
    "indented": "{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
    "year": "{{ strftime_now('%Y') }}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "blocks": "a\n    {% if true %}\nb\n    {% endif %}\n{# note #}\nc\n",
    "scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "not given": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ thinking is defined }}",
    "special": "{{ bos_token }}{{ eos_token }}{{ nothing }}",
}


@pytest.fixture
def decoder(chat_bundle: Path) -> Decoder:
    return open_decoder(chat_bundle, threads=1)


@pytest.fixture
def templated(chat_bundle: Path, tmp_path: Path) -> Callable[[str], ChatTemplate]:
    def make(template: str) -> ChatTemplate:
        (tmp_path / "chat_template.jinja").write_text(template)
        return open_template(tmp_path, TextTokenizer(chat_bundle, read_manifest(chat_bundle)))

    return make


@pytest.fixture(scope="module")
def reference(chat_pair: Directories) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(chat_pair[0])


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_those_of_transformers(name: str, decoder: Decoder, reference: Any) -> None:
    assert decoder.template is not None
    text = reference.apply_chat_template(CHATS[name], tokenize=False, add_generation_prompt=True)
    assert decoder.template.render(CHATS[name]) == text
    ids = reference.apply_chat_template(CHATS[name], add_generation_prompt=True)["input_ids"]
    assert decoder.chat(CHATS[name]).prompt == ids
    assert ids[:2] == [2, TURN]


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_language(name: str, templated: Callable[[str], ChatTemplate], reference: Any) -> None:
    chat = CHATS["three turns"]
    expected = reference.apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert templated(TEMPLATES[name]).render(chat) == expected


def test_text_begins_once(decoder: Decoder) -> None:
    assert decoder.tokenizer is not None
    assert decoder.tokenizer.encode("<bos>Return") == decoder.tokenizer.encode("Return")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"^the chat template refuses the messages: Conversation roles must alternate user/assistant/user/ass"),
        ("{{ 1 + 'a' }}", r"refuses the messages: unsupported operand"),
        ("{{ messages.append(1) }}", r"refuses the messages: .*append"),
        ("{{ ''.__class__.__mro__ }}", r"refuses the messages: .*unsafe"),
        ("{{ messages[0].x.y }}", r"refuses the messages: .*no attribute 'x'"),
    ],
)
def test_refused_messages_are_one_line(
    template: str | None, message: str, decoder: Decoder, templated: Callable[[str], ChatTemplate]
) -> None:
    used = decoder.template if template is None else templated(template)
    assert used is not None
    with pytest.raises(InputError, match=message) as error:
        used.render([user("a"), user("b")])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("template", ["\n{% if %}", "{{ a | nothing }}", "{% for a in b %}" * 30 + "{% endfor %}" * 30])
def test_broken_template_is_refused(template: str, chat_bundle: Path, tmp_path: Path) -> None:
    """The last template is valid Jinja, but its loops are too deep for Python's compiler."""
    broken = with_template(chat_bundle, tmp_path / "broken", template)
    with pytest.raises(InputError, match=r"broken/chat_template.jinja: not a chat template \(.*\); export the bundle"):
        open_decoder(broken)


def test_no_template_no_chat(chat_bundle: Path, tmp_path: Path) -> None:
    without = open_decoder(with_template(chat_bundle, tmp_path / "without", None))
    with pytest.raises(InputError, match=r"has no chat_template.jinja or no tokenizer.json.*, or leave --chat out$"):
        without.chat(CHATS["one turn"])


def finish(stream: Stream, cancel_after: int = 0) -> Stream:
    for count, _ in enumerate(stream, start=1):
        if count == cancel_after:
            stream.cancel()
    return stream


def turns(decoder: Decoder, cancel_after: int = 0, **options: Any) -> Iterator[tuple[list[dict[str, str]], Stream]]:
    """Messages and answers of a conversation that fills most of the context, 600 tokens."""
    messages = [SYSTEM]
    for number in range(5):
        messages = [*messages, user(f"Number {number}: return the value of the list, " * (number + 2))]
        stream = finish(decoder.chat(messages, max_new_tokens=45, **options), cancel_after)
        yield messages, stream
        messages = [*messages, model(stream.text)]


def draft_right(decoder: Decoder, plain: list[Stream]) -> None:
    """Let drafts be the tokens of plain decoding, each wrong with probability 0.3: a random pair accepts none."""
    texts, generator = [[*stream.prompt, *stream.tokens] for stream in plain], random.Random(0)

    def draft(last: int, num_draft_tokens: int) -> list[int]:
        before = [*decoder.engine.cache.tokens, last]
        right = next(text[len(before) :] for text in texts if text[: len(before)] == before)
        drafts = [*right, *([0] * num_draft_tokens)][:num_draft_tokens]
        return [token ^ 1 if generator.random() < 0.3 else token for token in drafts]

    decoder.engine.draft = draft  # type: ignore[method-assign]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [0, 4])
def test_reuse_changes_no_answer(drafts: int, sampled: dict[str, Any], decoder: Decoder, chat_bundle: Path) -> None:
    fresh = open_decoder(chat_bundle, threads=1)
    before, moved, accepted = 0, set(), 0
    if drafts:
        draft_right(decoder, [stream for _, stream in turns(fresh, num_draft_tokens=0, **sampled)])
    for messages, stream in turns(decoder, num_draft_tokens=drafts, **sampled):
        accepted += stream.stats.accepted
        fresh.forget()
        alone = finish(fresh.chat(messages, max_new_tokens=45, num_draft_tokens=drafts, **sampled))
        assert alone.stats.reused_tokens == 0
        assert (stream.prompt, stream.tokens) == (alone.prompt, alone.tokens)
        # All of the last prompt is reused, and what of its answer has the same tokens; the last token is always run.
        assert (stream.stats.reused_tokens > 0) == (before > 0)
        assert stream.stats.reused_tokens >= before - 1
        before = len(stream.prompt)
        moved.add(decoder.engine.cache.window_start)
    assert before > 400
    assert len(moved) > 1, "the sliding buffers never moved: make the conversation longer"
    assert accepted > 50 or not drafts


def test_window_that_moved_on_is_run_again(decoder: Decoder, chat_bundle: Path) -> None:
    """After a long text, the sliding buffers lack the rows that a short prompt with the same beginning attends to."""
    words = "return the value of the list, " * 65
    finish(decoder.chat([user("Go on. " + words)], max_new_tokens=100, num_draft_tokens=4))
    assert decoder.engine.cache.window_start > 0
    short = [user("Go on. return the value of")]
    stream = finish(decoder.chat(short, max_new_tokens=20, num_draft_tokens=4))
    assert stream.stats.reused_tokens == 0
    fresh = open_decoder(chat_bundle, threads=1)
    assert stream.tokens == finish(fresh.chat(short, max_new_tokens=20, num_draft_tokens=4)).tokens


@pytest.mark.parametrize("drafts", [0, 4])
def test_turn_after_a_cancelled_one(drafts: int, decoder: Decoder, chat_bundle: Path) -> None:
    fresh = open_decoder(chat_bundle, threads=1)
    if drafts:
        draft_right(decoder, [stream for _, stream in turns(fresh, 7, num_draft_tokens=0)])
    (_, first), (messages, second), *_ = turns(decoder, 7, num_draft_tokens=drafts)
    assert second.stats.accepted > 1 or not drafts
    assert (first.stats.finish_reason, len(first.tokens)) == ("cancelled", 8)
    assert messages[2] == model(first.text)
    assert second.stats.reused_tokens >= len(first.prompt) - 1
    alone = finish(fresh.chat(messages, max_new_tokens=45, num_draft_tokens=drafts), 7)
    assert (second.prompt, second.tokens) == (alone.prompt, alone.tokens)


def test_any_end_token_ends_a_turn(decoder: Decoder) -> None:
    """Its text is not returned. The engine is patched to choose `<turn|>`."""
    verify = decoder.engine.verify
    decoder.engine.verify = lambda last, drafts, sampling: _ended(verify(last, drafts, sampling))  # type: ignore
    stream = finish(decoder.chat([user("a")], num_draft_tokens=0))
    assert stream.stats.finish_reason == "eos"
    assert stream.tokens[1:] == [END_OF_TURN]
    assert "turn" not in stream.text


def _ended(done: Any) -> Any:
    done.tokens[-1] = END_OF_TURN
    return done


def test_answers_of_the_built_in_pair_are_reused(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Its answers encode to the tokens that were generated, except where the next turn joins."""
    turn = "{{ m.content }}{% if m.role != 'user' %}{{ '\n\n' }}{% endif %}"
    plain = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    decoder = open_decoder(with_template(bundle("demo"), tmp_path / "demo", plain), threads=1)
    messages: list[dict[str, str]] = []
    cached = 0
    for line in ("Return the", "Raise a", "The module is"):
        messages = [*messages, user(line)]
        stream = finish(decoder.chat(messages, max_new_tokens=40))
        assert re.search(r"[a-z]{3} [a-z]{2}", stream.text), stream.text
        assert stream.stats.reused_tokens >= cached
        cached = len(stream.prompt) + len(stream.tokens) - 3  # the newest token is not in the cache yet
        messages = [*messages, model(stream.text)]
