"""Write conversation.json, which tests calls of tools and prompts: `python -m tests.vectors.make_conversation`.

Calls are written by a chat template like Gemma's, whole or spoilt, or in JSON; what they mean is what
`runtime_ref.tool_calls` reads, which tests compare with transformers. Prompts are those that templates render.
"""

import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exporter.bundle.plain_chat import plain_chat
from exporter.checkpoint.special_tokens import special_tokens
from runtime_ref.chat import ChatTemplate, Message, open_template
from runtime_ref.errors import InputError
from runtime_ref.tokenizer import TextTokenizer
from runtime_ref.tool_calls import read_call
from tests.chats import SPEAKING, TALKING, WEATHER, save_talking

FILE = Path(__file__).with_name("conversation.json")
FORMS = (
    {"before": "call:", "after": "", "syntax": "pairs", "quote": '<|"|>'},
    {"before": "", "after": "", "syntax": "json"},
    {"before": "x", "after": "y", "syntax": "pairs", "quote": "'"},
    {"before": "", "after": "", "syntax": "another"},
)
TEMPLATE = ChatTemplate(TALKING, "t", "", {"bos_token": "<bos>"})
TEXTS = ("", "Bern", " a b ", "é中👩‍💻", '{"a": [1]}', "x:y,z}", "line\nline", "\\n", "5", "true")
SPOILT = (
    *("call:a", "call:{}", "call:a{b}", "call:a{b:}", "call:a{b:1 2}", 'call:a{b:<|"|>c}', "call:a{b:NaN}", "a{}", ""),
    *(
        "call:a{}b",
        "call:a {b : 1}",
        'call:a{<|"|>b c<|"|>:[1, 2 , {d:None}]}',
        "call:a{b:[1,]}",
        "call:a{b:[}",
        "call:a{b:1,}",
    ),
    *("call:a{b:" + "[" * 70 + "]" * 70 + "}", "call:a{b:01}", "call:a{b:-}", "call:a{b:1.5e3,c:-0,d:1E+2,e:.5}"),
    *(
        'call:a{b:"c\\u00e9\\n",d:"}"}',
        'call:a{b:"c}',
        "call:a{b:nul}",
        "call:a{b:truex}",
        "call:a{b:9007199254740993}",
        "call:a{b:1e999}",
    ),
)


def value(generator: random.Random, depth: int = 0) -> Any:
    """Return a value of JSON."""
    plain = [None, True, False, generator.randrange(-9, 10**6), generator.uniform(-1, 1), generator.choice(TEXTS)]
    if depth == 3 or generator.random() < 0.6:
        return generator.choice(plain)
    items = [value(generator, depth + 1) for _ in range(generator.randrange(3))]
    return items if generator.random() < 0.5 else {f"k{i}": item for i, item in enumerate(items)}


def calls() -> list[dict[str, Any]]:
    """Return texts of calls, with how they are written and what they mean."""
    generator = random.Random(0)
    texts = [(text, 0, True) for text in SPOILT]
    for number in range(60):
        arguments = {f"a{i}": value(generator) for i in range(generator.randrange(4))}
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        text = written(call)
        at = generator.randrange(len(text))
        texts += [(text, 0, number % 7 != 0), (text[:at] + text[at + 1 :], 0, True), (text[:at], 0, True)]
        whole = json.dumps({"name": "weather", ("arguments", "parameters")[number % 2]: arguments})
        texts += [(f"\n{whole}\n", 1, True), (f"[{whole}]", 1, True), (whole[:at], 1, True)]
        texts.append((f"x{text.removeprefix('call:').replace(FORMS[0]['quote'], chr(39))}y", 2, True))
    deep = ["[" * depth + "]" * depth for depth in (63, 64)]
    texts += [(f'{{"name": "a", "arguments": {{"b": {item}}}}}', 1, True) for item in deep]
    odd = ('{"name": 1}', "3", "{" * 9000, "[" * 9000, "{1: 2}", '{"name": "a"}', '{"name": "a", "arguments": []}')
    texts += [(text, 1, True) for text in odd]
    texts.append(("call:a{}", 3, True))
    rows = []
    for text, form, closed in texts:
        call = read_call(text, FORMS[form], closed=closed)
        read = {"name": call.name, "arguments": call.arguments} if not call.problem else {}
        rows.append({"text": text, "form": form, "closed": closed, **read})
    return rows


def talk(generator: random.Random) -> list[Message]:
    """Return a conversation in which tools are called; in some a message is where few templates have room."""
    texts = ("", "Hi.", " a<turn|>\n", "<|channel>thought\nx<channel|>y", "{b}", "é 中", "\u3000", '<|"|>', "Bern")
    messages: list[Message] = [{"role": "system", "content": generator.choice(texts)}] * generator.randrange(2)
    for _ in range(generator.randrange(1, 4)):
        messages.append({"role": "user", "content": generator.choice(texts)})
        for _ in range(generator.randrange(3)):
            thought = {"reasoning_content": generator.choice(texts)} if generator.random() < 0.5 else {}
            made = [
                {
                    "id": f"{i:09d}",
                    "type": "function",
                    "function": {"name": f"tool_{i}", "arguments": {"a": value(generator)}},
                }
                for i in range(generator.randrange(1, 3))
            ]
            said = generator.choice(texts) if generator.random() < 0.4 else ""
            messages.append({"role": "assistant", "content": said, "tool_calls": made, **thought})
            for call in made:
                name = call["function"]["name"]
                of_call = {"name": name, "tool_call_id": call["id"]}
                messages.append({"role": "tool", "content": generator.choice(texts), **of_call})
        thought = {"reasoning_content": generator.choice(texts)} if generator.random() < 0.5 else {}
        messages.append({"role": "assistant", "content": generator.choice(texts), **thought})
    messages = messages[: -1 if generator.random() < 0.7 else None]
    if generator.random() < 0.15:
        messages.insert(generator.randrange(len(messages)), messages[-1])
    if generator.random() < 0.15:
        del messages[generator.randrange(len(messages))]  # some calls have no answer then
    if generator.random() < 0.05:
        messages.append({"role": generator.choice(("answer", "call", "ask")), "content": "Hi."})
    return messages


def prompts(template: str, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the forms of a template, and conversations with the prompts that it renders; none where it has no place.

    Args:
        template: text of the chat template.
        number: of the first form.
    """
    generator = random.Random(number)
    with tempfile.TemporaryDirectory() as name:
        save_talking(directory := Path(name), template)
        tokens = special_tokens(directory)[0]
        forms = plain_chat(directory, tokens, [WEATHER]).conversations
        rendered = open_template(directory, TextTokenizer(directory, tokens)).render
    rows = []
    for i, form in enumerate(forms):
        for _ in range(40):
            messages, tools = talk(generator), [WEATHER] if form.tools else None
            try:
                form.render(messages, json.dumps)
                prompt = rendered(messages, tools=tools, thinking=form.thinking[0])
            except (InputError, ValueError):
                prompt = None
            rows.append({"form": number + i, "messages": [plain(m) for m in messages], "prompt": prompt})
    return [asdict(form) for form in forms], rows


def plain(message: Message) -> dict[str, Any]:
    """Return a message with its calls as they are written."""
    calls = [written(call) for call in message.get("tool_calls", ())]
    rest = {key: item for key, item in message.items() if key not in ("tool_calls", "tool_call_id")}
    return {**rest, **({"calls": calls} if calls else {})}


def written(call: Any) -> str:
    """Return the text of a call, as `TALKING` writes it."""
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = TEMPLATE.render(messages, ask=False)
    return text.partition("<|tool_call>")[2].rpartition("<tool_call|>")[0]


def text() -> str:
    """Return the text of conversation.json, a row in each line."""
    parts: dict[str, Any] = {"forms": FORMS, "calls": calls(), "conversation_forms": [], "conversations": []}
    for template in (TALKING, SPEAKING):
        forms, rows = prompts(template, len(parts["conversation_forms"]))
        parts["conversation_forms"] += forms
        parts["conversations"] += rows
    lines = (f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in parts.items())
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
