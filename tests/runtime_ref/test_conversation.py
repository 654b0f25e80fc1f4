"""Thoughts and calls of tools: prompts and parsed answers are those of transformers, whatever the model writes."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_parsing.response_parser import parse_response

from exporter.checkpoint.special_tokens import SpecialTokens, special_tokens
from exporter.checkpoint.template_parts import call_form, call_marks
from runtime_ref.chat import ChatTemplate, open_template, read_tools
from runtime_ref.errors import InputError
from runtime_ref.token_stream import Stream
from runtime_ref.tokenizer import TextTokenizer
from runtime_ref.tool_calls import ToolCall, read_call
from tests.chats import MARK, TALKING, TEMPLATE, WEATHER, save_talking
from tests.scripted import scripted
from tests.vectors import make_conversation

# How transformers is told to read answers in Gemma 4's form.
RESPONSE = {
    "start_anchor": "<|turn>model\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>[^{]*)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
USER = {"role": "user", "content": " What now? "}
CALL = {"id": "000000001", "type": "function", "function": {"name": "weather", "arguments": {"place": "Bern"}}}
TEMPLATED = ChatTemplate(TALKING, "t", "", {"bos_token": "<bos>"})
FORM = {"before": "call:", "after": "", "syntax": "pairs", "quote": '<|"|>'}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("talking")
    save_talking(directory)
    return directory


@pytest.fixture(scope="module")
def reference(talking: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(talking)


@pytest.fixture(scope="module")
def tokens(talking: Path) -> SpecialTokens:
    return special_tokens(talking)[0]


@pytest.fixture(scope="module")
def tokenizer(talking: Path, tokens: SpecialTokens) -> TextTokenizer:
    return TextTokenizer(talking, tokens)


@pytest.fixture(scope="module")
def template(talking: Path, tokenizer: TextTokenizer) -> ChatTemplate:
    return open_template(talking, tokenizer)


@pytest.fixture
def answer(tokens: SpecialTokens, tokenizer: TextTokenizer, template: ChatTemplate) -> Any:
    """Return a function that lets a decoder write a text, and returns its stream and its tokens."""

    def write(text: str, prompt: str = "<bos>", **options: Any) -> tuple[Stream, list[Any]]:
        script = [*tokenizer.encode(text)[1:], MARK["<turn|>"]]
        decoder = scripted(tokens, script, tokenizer, template)
        stream = decoder.stream(prompt, num_draft_tokens=0, **{"max_new_tokens": len(script), **options})
        return stream, list(stream)

    return write


def conversations() -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Yield conversations, with and without tools; some end in an answer of a tool."""
    generator = random.Random(0)
    texts = ("", "Hi.", " a<turn|>\n", "<|channel>thought\nx<channel|>y", "{b}", "é 中", "<|think|>")
    for number in range(60):
        messages: list[dict[str, Any]] = [{"role": "system", "content": generator.choice(texts)}] * (number % 3 == 0)
        for _ in range(generator.randrange(1, 4)):
            messages.append({"role": "user", "content": generator.choice(texts)})
            for _ in range(generator.randrange(3)):
                values = [generator.choice(texts), generator.randrange(9), None, True, [1.5, {"k": "v"}]]
                call = {"name": "weather", "arguments": dict(zip("abc", generator.sample(values, 3), strict=True))}
                calls = [{"id": "1", "type": "function", "function": call}] * generator.randrange(1, 3)
                answer = {"role": "assistant", "content": generator.choice(texts), "tool_calls": calls}
                if generator.random() < 0.5:
                    answer["reasoning_content"] = generator.choice(texts)
                tool = {"role": "tool", "name": "weather", "tool_call_id": "1", "content": generator.choice(texts)}
                messages += [answer, tool]
            messages.append({"role": "assistant", "content": generator.choice(texts)})
        yield messages[: -1 if number % 2 else None], bool(number % 4)


def test_prompts_are_those_of_transformers(template: ChatTemplate, tokenizer: TextTokenizer, reference: Any) -> None:
    for messages, has_tools in conversations():
        for thinking in (None, True, False):
            tools, more = [WEATHER] * has_tools or None, {} if thinking is None else {"enable_thinking": thinking}
            ask = {"tools": tools, "add_generation_prompt": True, **more}
            text = template.render(messages, tools=tools, thinking=thinking)
            assert text == reference.apply_chat_template(messages, tokenize=False, **ask)
            assert tokenizer.encode(text) == reference.apply_chat_template(messages, **ask)["input_ids"]


ANSWERS = (
    "Yes.",
    "<|channel>thought\nHm, so.\n<channel|>Yes.",
    "<|channel>thought\nHm\nso\n\n<channel|>Yes.",
    '<|tool_call>call:weather{place:<|"|>Bern<|"|>,days:3}<tool_call|><|tool_response>',
    '<|channel>thought\n\n<channel|><|tool_call>call:a{}<tool_call|><|tool_call>call:b{c:[<|"|>{d}<|"|>]}<tool_call|>',
    "<|channel>thought\né中👩‍💻<channel|>é中👩‍💻",
)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_read_as_transformers_reads_them(text: str, answer: Any) -> None:
    stream, given = answer(text)
    response = parse_response(text.removesuffix("<|tool_response>"), RESPONSE, prefix="<|turn>model\n")
    calls = response.get("tool_calls", [])
    assert stream.text == response.get("content", "")
    assert stream.thought.strip() == response.get("reasoning_content", "")  # transformers trims texts
    assert [call["function"] for call in stream.message.get("tool_calls", [])] == [call["function"] for call in calls]
    assert not any(call.problem for call in stream.calls)
    of_part = {part: "".join(t.part_text for t in given if t.part == part) for part in {t.part for t in given}}
    assert of_part.get("answer", "") == stream.text == "".join(token.text for token in given)
    assert of_part.get("thought", "") == stream.thought
    assert of_part.get("tool_call", "") == "".join(call.text for call in stream.calls)
    assert [token.id for token in given] == stream.tokens


def test_only_what_a_template_writes_around_a_thought_is_left_out(answer: Any) -> None:
    assert answer("<|channel>thought\n\n a\n\n<channel|>")[0].thought == "\n a\n"
    assert answer("<|channel>thoughtful<channel|>")[0].thought == "thoughtful"
    assert answer("<|channel>thou<channel|>")[0].thought == "thou"
    assert answer("<|channel>thought\na\n", max_new_tokens=6)[0].thought.startswith("a")


def test_the_next_turn_repeats_what_the_template_repeats(answer: Any, template: ChatTemplate, reference: Any) -> None:
    """After a tool's answer the thought is repeated, as the model wrote it; after the user's next message it is not."""
    text = '<|channel>thought\nLook.\n<channel|><|tool_call>call:weather{place:<|"|>Bern<|"|>}<tool_call|>'
    asked = template.prompt([USER], [WEATHER], thinking=True)
    stream, _ = answer(text, asked)
    (call,) = stream.calls
    tool = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "rain"}
    messages = [USER, stream.message, tool]
    prompt = template.prompt(messages, [WEATHER], thinking=True)
    assert prompt == reference.apply_chat_template(
        messages, tools=[WEATHER], enable_thinking=True, tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith(f"{asked}{text}<|tool_response>") and prompt.endswith("<|channel>thought\n")
    last, given = answer("It rains.\n<channel|>Take an umbrella.", prompt)
    assert (last.thought, last.text) == ("It rains.", "Take an umbrella.")
    assert {token.part for token in given[:3]} == {"thought"}
    later = template.render([*messages, last.message, {**USER, "content": "And now?"}], tools=[WEATHER], thinking=True)
    assert "Look." not in later and "It rains." not in later and "Take an umbrella." in later


def test_a_thought_that_the_prompt_begins(answer: Any) -> None:
    """What stands around it is left out once, and is no new text."""
    stream, given = answer("thought\nx\n<channel|>y", "<bos><|turn>model\n<|channel>thought\n")
    assert (stream.thought, stream.text) == ("thought\nx", "y")
    assert "".join(token.part_text for token in given if token.part == "thought") == stream.thought


def test_a_call_counts_once_it_ends(answer: Any) -> None:
    stream, _ = answer("a", max_new_tokens=1)
    tokens = stream._conversation.decoder.tokenizer.encode("<|tool_call>call:a{}<tool_call|>")[1:]
    stream.stats.finish_reason = ""  # as while it is generated
    counts = []
    for token in tokens:
        stream._texts.add(token)
        counts.append(len(stream.calls))
    assert counts == [*[0] * (len(tokens) - 1), 1]


def test_thinking_that_is_switched_off_is_not_thinking_that_is_left_out(reference: Any) -> None:
    source = "{{ 'off' if enable_thinking is defined and not enable_thinking else 'on' }}{{ messages[0].content }}"
    template = ChatTemplate(source, "t", "", {})
    for thinking, more in ((None, {}), (True, {"enable_thinking": True}), (False, {"enable_thinking": False})):
        expected = reference.apply_chat_template([USER], chat_template=source, tokenize=False, **more)
        assert template.render([USER], thinking=thinking) == expected
    assert template.prompt([USER], thinking=False).startswith("off")


def test_what_every_turn_has_marks_no_calls() -> None:
    """As in Llama 3.1, whose calls are plain JSON after the turn's own marks."""
    source = (
        "{% for m in messages %}<|turn>{{ m.role }}<turn|>{{ (m.tool_calls[0].function | tojson) if m.tool_calls else"
        " m.content }}<|end|>{% endfor %}"
    )
    added = {"<|turn>": 5, "<turn|>": 6, "<|end|>": 7}
    assert call_marks(ChatTemplate(source, "t", "", {}), added) is None
    parted = "{% for m in messages %}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}<sep>{{"
    parted += " c.function.arguments | tojson }}<turn|>{% endfor %}{{ m.content }}<turn|>{% endfor %}"
    assert call_marks(ChatTemplate(parted, "t", "", {}), {**added, "<call>": 8, "<sep>": 9}) is None
    marked = source.replace("{{ (m.tool_calls", "{% if m.tool_calls %}<call>{% endif %}{{ (m.tool_calls")
    assert call_marks(ChatTemplate(marked, "t", "", {}), {**added, "<call>": 8}) is None  # no mark ends it


def test_two_calls_have_two_ids(answer: Any) -> None:
    stream, given = answer("<|tool_call>call:a{}<tool_call|><|tool_call>call:a{}<tool_call|>")
    begins = [i for i, token in enumerate(given) if token.id == MARK["<|tool_call>"]]
    assert [call.id for call in stream.calls] == [f"{len(stream.prompt) + i:09d}" for i in begins]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("call:a{b:1", "expected ',' or '}' at ''"),
        ("call:a", "expected '{' after 'a'"),
        ("a{}", "expected 'call:' at its beginning"),
        ("call:{}", "names no tool"),
        ("call:a{b}", "expected ':' after 'b}'"),
        ("call:a{b:}", "expected a value at '}'"),
        ("call:a{b:1 2}", "expected ',' or '}' at '2}'"),
        ('call:a{b:<|"|>c}', "expected '<|\"|>' after 'c}'"),
        ('call:a{<|"|>b<|"|>1}', "expected ':' at '1}'"),
        ("call:a{b:NaN}", "NaN is no value of JSON"),
        ("call:a{}b", "'b' follows the call"),
        ('call:a{b:"\\ud800"}', "a text in it is not valid UTF-8"),
        ("call:a{b:" + "[" * 2000, "nested too deeply"),
        ("call:a{b:" + "9" * 5000 + "}", "integer string conversion"),
    ],
)
def test_malformed_calls_are_data(text: str, problem: str, answer: Any) -> None:
    stream, _ = answer(f"Wait.<|tool_call>{text}<tool_call|>")
    (call,) = stream.calls
    assert (call.name, dict(call.arguments), call.text) == ("", {}, text)
    assert problem in call.problem
    assert stream.message == {"role": "assistant", "content": "Wait."}


def test_a_call_that_the_budget_cuts_off(answer: Any) -> None:
    stream, _ = answer("<|tool_call>call:a{}<tool_call|>", max_new_tokens=3)
    (call,) = stream.calls
    assert call.problem == "the call has no end"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_no_text_is_an_unexpected_error(text: str) -> None:
    for form in (FORM, {"before": "", "after": "", "syntax": "json"}, {}):
        assert isinstance(read_call(text, form), ToolCall)
        assert isinstance(read_call(f"call:a{{b:{text}}}", form), ToolCall)


KEYS = st.from_regex(r"[a-zA-Z_][a-zA-Z_0-9-]{0,8}", fullmatch=True)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_a_template_writes_is_read_back(arguments: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    text = TEMPLATED.render([USER, {"role": "assistant", "content": "", "tool_calls": [call]}], ask=False)
    written = text.partition("<|tool_call>")[2].rpartition("<tool_call|>")[0]
    assert read_call(written, FORM) == ToolCall("", "weather", arguments, written)


def test_the_vectors_are_those_of_their_script() -> None:
    assert make_conversation.FILE.read_text(encoding="utf-8") == make_conversation.text()


def test_calls_in_json() -> None:
    form = {"before": "\n", "after": "\n", "syntax": "json"}
    for key in ("arguments", "parameters"):
        text = json.dumps({"name": "weather", key: {"place": "Bern"}})
        for written in (f"\n{text}\n", f"[{text}]"):
            assert read_call(written, form) == ToolCall("", "weather", {"place": "Bern"}, written)
    assert "expected an object with a name" in read_call("[]", form).problem
    assert "arguments are 3" in read_call('{"name": "a", "arguments": 3}', form).problem
    hermes = ChatTemplate(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}<call>\n{{ c.function | tojson }}\n</call>{% endfor %}"
        "{{ m.content }}{% endfor %}",
        *("t", ""),
        {},
    )
    assert call_form(hermes, "<call>", "</call>") == form


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": 3}], "a message is .*expected an object with the texts"),
        ([{"role": "user"}], "a message is .*expected an object with the texts"),
        ([{"content": "a"}], "a message is .*expected an object with the texts"),
        ([{"role": "user", "content": ["a"]}], "has the content 'a', expected an object with type and text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of type 'image'; a bundle reads text alone"),
    ],
)
def test_other_messages_are_refused(messages: Any, message: str, template: ChatTemplate) -> None:
    with pytest.raises(InputError, match=message):
        template.render(messages)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", '"a"'])
def test_other_tools_are_refused(content: str, template: ChatTemplate, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(InputError, match=r"expected a JSON list|a tool is 1, expected an object"):
        read_tools(tmp_path / "tools.json")
    with pytest.raises(InputError, match=r"tools are \w+, expected a list|a tool is 1, expected an object"):
        template.render([USER], tools=json.loads(content))


def test_what_a_template_has_no_place_for_is_refused() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "t", "", {})
    assert template.prompt([USER], []) == USER["content"]
    with pytest.raises(InputError, match="leaves out tools"):
        template.prompt([USER], [WEATHER])
    for thinking in (True, False):
        with pytest.raises(InputError, match="has no enable_thinking"):
            template.prompt([USER], thinking=thinking)


def test_a_template_without_calls_or_thoughts(talking: Path, tmp_path: Path) -> None:
    save_talking(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokens, _ = special_tokens(tmp_path)
    assert (tokens.channels, tokens.parts) == ({}, {})


def test_a_file_that_forgets_what_follows_a_call_is_warned_of(tmp_path: Path) -> None:
    save_talking(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, MARK["<turn|>"]]}))
    (warning,) = special_tokens(tmp_path)[1]
    assert f"lacks {MARK['<|tool_response>']}, which the chat template writes after a call of a tool" in warning
    (tmp_path / "generation_config.json").unlink()
    assert special_tokens(tmp_path)[0].eos == (1, MARK["<turn|>"], MARK["<|tool_response>"])
