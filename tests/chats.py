"""Checkpoints with a chat template: the built-in pair's tokenizer with turn tokens, and templates like Gemma's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from exporter.demo import PAIR
from tests.handmade import listed_files
from tests.pairs import SHAPES, save_pair

TURN, END_OF_TURN = 2048, 2049  # ids of tokens that are added to the tokenizer's vocabulary of 2048
VOCAB = 2064

TEMPLATE = """\
{%- macro turn(role, content, closed=true) -%}
    {{ '<|turn>' + role + '\\n' + content | trim }}
    {%- if closed %}{{ '<turn|>\\n' }}{% endif %}
{%- endmacro -%}
{{ bos_token }}
{%- set state = namespace(asked=none) -%}
{%- if messages[0]['role'] in ['system', 'developer'] -%}
    {{ turn('system', messages[0]['content']) }}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{% if tools is not none %}{{ raise_exception('tools are not supported') }}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate\\nuser/assistant/user/assistant/...") }}
    {% endif %}
    {% if message['content'] | length == 97 %}{% break %}{% endif %}
    {% if message['role'] == 'assistant' %}
        {%- generation -%}
            {%- set state.asked = none -%}
            {{ turn('model', message['content']) }}
        {%- endgeneration -%}
    {% else %}
        {%- set state.asked = message -%}
        {{ turn(message['role'], message['content']) }}
    {%- endif %}
{% endfor %}
{% if state.asked and state.asked['content'] | length == 98 %}{{ state.asked | tojson }}{{ eos_token }}{% endif %}
{% if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
{%- endif %}
"""

# Thinking is removed from answers, successive answers are one turn, and the next answer begins after empty thinking.
CHANNELS = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- set kept = namespace(text=message.content) -%}
    {%- if message.role == 'assistant' -%}
        {%- set kept.text = '' -%}
        {%- for part in message.content.split('<channel|>') -%}
            {%- set kept.text = kept.text ~ part.split('<|channel>')[0] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if loop.first or message.role == 'user' or loop.previtem.role != message.role -%}
        {{ '<|turn>' ~ {'assistant': 'model'}.get(message.role, message.role) ~ '\\n' }}
    {%- endif -%}
    {{ kept.text | trim }}{{ '<turn|>\\n' }}
{%- endfor -%}
{{ '<|turn>model\\n<|channel>thought\\n<channel|>' if add_generation_prompt }}
"""
# Contents are not stripped, roles can have any order, and there is no beginning-of-text token.
VERBATIM = """\
{% for message in messages %}
{% if message.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}
[{{ message.role }}] {{ message.content }}[end]
{% endfor %}
[assistant]
{{- ' ' }}
"""


def save_chat_pair(directory: Path) -> tuple[Path, Path]:
    """Save a tiny random pair with a tokenizer and `TEMPLATE`; it generates long, meaningless text.

    Args:
        directory: gets `target` and `drafter`.

    Returns:
        The directories of target and drafter.
    """
    shape = replace(SHAPES["e2b"], vocab=VOCAB)
    target, drafter = save_pair(shape, directory)
    tokenizer = json.loads((PAIR / "target" / "tokenizer.json").read_text())
    for token, text in ((TURN, "<|turn>"), (END_OF_TURN, "<turn|>")):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": token, "content": text})
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    (target / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": [1, END_OF_TURN]}))
    (target / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE})
    )
    return target, drafter


def with_template(bundle: Path, copy: Path, template: str | None) -> Path:
    """Copy a bundle, with another chat template or with none.

    Args:
        bundle: bundle directory.
        copy: directory to write.
        template: text of the template; None for none.

    Returns:
        `copy`.
    """
    shutil.copytree(bundle, copy)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"files": listed_files(copy)}))
    return copy


# The marks of Gemma 4, which `TALKING` writes; ids from 2048 on in `talking_tokenizer`.
MARKS = (
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
MARK = {mark: TURN + i for i, mark in enumerate(MARKS)}

# Thinking, tools and their answers in Gemma 4's form: one turn goes on from calls to answers to the next thought. What
# is said beside calls comes after the answers.
TALKING = """\
{%- macro value(item) -%}
    {%- if item is none -%}null
    {%- elif item is boolean -%}{{ 'true' if item else 'false' }}
    {%- elif item is string -%}{{ '<|"|>' ~ item ~ '<|"|>' }}
    {%- elif item is mapping -%}{ {{- members(item) -}} }
    {%- elif item is sequence -%}[{% for one in item %}{{ value(one) }}{{ ',' if not loop.last }}{% endfor %}]
    {%- else -%}{{ item }}
    {%- endif -%}
{%- endmacro -%}
{%- macro members(object) -%}
    {%- for key, item in object | dictsort -%}{{ key }}:{{ value(item) }}{{ ',' if not loop.last }}{%- endfor -%}
{%- endmacro -%}
{%- macro answer(text) -%}
    {%- for part in text.split('<channel|>') -%}{{ part.split('<|channel>')[0] }}{%- endfor -%}
{%- endmacro -%}
{%- set thinks = enable_thinking | default(false) -%}
{{- bos_token -}}
{%- set first = messages[0] if messages[0].role in ['system', 'developer'] else none -%}
{%- if thinks or tools or first -%}
    {{- '<|turn>system\\n' ~ ('<|think|>\\n' if thinks else '') ~ (first.content | trim if first else '') -}}
    {%- for tool in tools or [] -%}
        {{- '<|tool>' ~ tool.function.name ~ '{' ~ members(tool.function) ~ '}<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- set messages = messages[1:] if first else messages -%}
{%- set state = namespace(asked=-1, open=false, role='', kept='') -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set state.asked = loop.index0 %}{% endif %}{% endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|tool_response>response:' ~ message.name ~ '{value:' ~ value(message.content) ~ '}<tool_response|>' -}}
    {%- else -%}
        {{- state.kept -}}
        {%- set state.kept = '' -%}
        {%- if not (state.open and message.role == 'assistant') -%}
            {{- '<|turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\\n' -}}
        {%- endif -%}
        {%- if message.reasoning_content and loop.index0 > state.asked -%}
            {{- '<|channel>thought\\n' ~ message.reasoning_content ~ '\\n<channel|>' -}}
        {%- endif -%}
        {%- set text = (answer(message.content or '') if message.role == 'assistant' else message.content) | trim -%}
        {%- for call in message.tool_calls or [] -%}
            {{- '<|tool_call>call:' ~ call.function.name ~ '{' ~ members(call.function.arguments) ~ '}<tool_call|>' -}}
        {%- endfor -%}
        {%- if not message.tool_calls %}{{ text ~ '<turn|>\\n' }}
        {%- else %}{% set state.kept = text ~ ('<|tool_response>' if loop.last else '') %}
        {%- endif -%}
        {%- set state.open = message.role == 'assistant' and message.tool_calls -%}
    {%- endif -%}
    {%- set state.role = message.role -%}
{%- endfor -%}
{{- state.kept -}}
{%- if add_generation_prompt -%}
    {%- if not state.open -%}{{ '<|turn>model\\n' }}
    {%- elif thinks and state.role == 'tool' -%}{{ '<|channel>thought\\n' }}
    {%- endif -%}
{%- endif -%}
"""
# What is said beside calls comes before them, tools' answers are trimmed and have no names, thoughts come with calls
# alone, and there is no `enable_thinking`.
SPEAKING = TALKING
for _old, _new in (
    ("enable_thinking | default(false)", "false"),
    ("state.kept = text ~", "state.kept ="),
    ("{%- for call in message.tool_calls", "{{- text if message.tool_calls -}}{%- for call in message.tool_calls"),
    ("value(message.content)", "value(message.content | trim)"),
    ("response:' ~ message.name ~ '{", "response:{"),
    ("message.reasoning_content and", "message.reasoning_content and message.tool_calls and"),
):
    assert SPEAKING.count(_old) == 1, _old
    SPEAKING = SPEAKING.replace(_old, _new)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "nullable": True}},
            "required": ["place"],
        },
    },
}


def save_talking(directory: Path, template: str = TALKING) -> None:
    """Write a template and a tokenizer that has `MARKS` to a directory, with what they need to be a checkpoint's.

    Args:
        directory: of a checkpoint or a bundle.
        template: text of the template.
    """
    tokenizer = json.loads((PAIR / "target" / "tokenizer.json").read_text())
    for mark, token in MARK.items():
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": token, "content": mark})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    ends = [1, MARK["<turn|>"], MARK["<|tool_response>"]]
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": ends}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    (directory / "chat_template.jinja").write_text(template)
