"""Write conversation.json, which tests readers of calls of tools: `python -m tests.vectors.make_conversation`.

Calls are written by a chat template like Gemma's, whole or spoilt, or in JSON; what they mean is what
`runtime_ref.tool_calls` reads, which tests compare with transformers.
"""

import json
import random
from pathlib import Path
from typing import Any

from runtime_ref.chat import ChatTemplate
from runtime_ref.tool_calls import read_call
from tests.chats import TALKING

FILE = Path(__file__).with_name("conversation.json")
FORMS = (
    {"before": "call:", "after": "", "syntax": "pairs", "quote": '<|"|>'},
    {"before": "", "after": "", "syntax": "json"},
    {"before": "x", "after": "y", "syntax": "pairs", "quote": "'"},
    {"before": "", "after": "", "syntax": "another"},
)
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
    generator, template = random.Random(0), ChatTemplate(TALKING, "t", "", {"bos_token": "<bos>"})
    written = [(text, 0, True) for text in SPOILT]
    for number in range(60):
        arguments = {f"a{i}": value(generator) for i in range(generator.randrange(4))}
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        text = template.render(messages, ask=False).partition("<|tool_call>")[2].rpartition("<tool_call|>")[0]
        at = generator.randrange(len(text))
        written += [(text, 0, number % 7 != 0), (text[:at] + text[at + 1 :], 0, True), (text[:at], 0, True)]
        whole = json.dumps({"name": "weather", ("arguments", "parameters")[number % 2]: arguments})
        written += [(f"\n{whole}\n", 1, True), (f"[{whole}]", 1, True), (whole[:at], 1, True)]
        written.append((f"x{text.removeprefix('call:').replace(FORMS[0]['quote'], chr(39))}y", 2, True))
    deep = ["[" * depth + "]" * depth for depth in (63, 64)]
    written += [(f'{{"name": "a", "arguments": {{"b": {item}}}}}', 1, True) for item in deep]
    odd = ('{"name": 1}', "3", "{" * 9000, "[" * 9000, "{1: 2}", '{"name": "a"}', '{"name": "a", "arguments": []}')
    written += [(text, 1, True) for text in odd]
    written.append(("call:a{}", 3, True))
    rows = []
    for text, form, closed in written:
        call = read_call(text, FORMS[form], closed=closed)
        read = {"name": call.name, "arguments": call.arguments} if not call.problem else {}
        rows.append({"text": text, "form": form, "closed": closed, **read})
    return rows


def text() -> str:
    """Return the text of conversation.json, a row in each line."""
    parts = {"forms": FORMS, "calls": calls()}
    lines = (f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in parts.items())
    return "{" + ",\n".join(lines) + "}\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
