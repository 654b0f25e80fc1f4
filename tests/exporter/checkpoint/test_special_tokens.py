"""What ends a text, what is never generated and what is a thought, by a checkpoint's files; against transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from exporter.checkpoint.config_json import config_notes
from exporter.checkpoint.generation_config import default_sampling, generation_warnings
from exporter.checkpoint.generation_keys import IGNORED_KEYS, READ_KEYS, UNSUPPORTED_KEYS
from exporter.checkpoint.pair import open_pair
from exporter.checkpoint.special_tokens import special_tokens
from exporter.parity.stages import run_parity
from runtime_ref.errors import InputError
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import open_decoder
from tests.chats import CHANNELS, END_OF_TURN, TEMPLATE, TURN
from tests.conftest import Directories
from tests.exporter.checkpoint.forms import edit_json
from tests.exports import export

WITHOUT_END = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
# What follows the end mark is kept, whatever the begin mark is; turns have marks of their own.
THINK = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content.split('</think>')[-1] | trim }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{{ '<think>' if think }}{% endif %}"
)
WRITES_EMPTY_THOUGHTS = THINK.replace("{{ m.content", "{{ '<think></think>' ~ m.content")
REFUSES_ENDING_WITH_ANSWER = TEMPLATE.replace(
    "{% if tools is", "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% if tools is"
)
WITHOUT_CONTENT = "{{ bos_token }}{% for m in messages %}{{ m.content.text }}{% endfor %}"


@pytest.fixture
def target(chat_pair: Directories, tmp_path: Path) -> Path:
    """A chat checkpoint without generation_config.json."""
    directory = Path(shutil.copytree(chat_pair[0], tmp_path / "target"))
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory


def add_tokens(target: Path, special: bool, *names: str) -> list[int]:
    """Let the tokenizer know more tokens, and return their ids."""
    document = json.loads((target / "tokenizer.json").read_text())
    first = max(token["id"] for token in document["added_tokens"]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    document["added_tokens"] += [{"id": first + i, "content": name, **flags} for i, name in enumerate(names)]
    (target / "tokenizer.json").write_text(json.dumps(document))
    return [first + i for i in range(len(names))]


@pytest.mark.parametrize(
    ("template", "tokenizer_config", "generation", "expected"),
    [
        (TEMPLATE, {}, None, {1, END_OF_TURN}),
        (TEMPLATE, {}, {"bos_token_id": 2}, {1, END_OF_TURN}),
        (TEMPLATE, {}, {"eos_token_id": None}, {1, END_OF_TURN}),
        (TEMPLATE, {}, {"eos_token_id": []}, {1, END_OF_TURN}),
        (TEMPLATE, {}, {"eos_token_id": -1}, {1, END_OF_TURN}),
        (REFUSES_ENDING_WITH_ANSWER, {}, None, {1, END_OF_TURN}),
        (WITHOUT_CONTENT, {}, None, {1}),
        (WITHOUT_END, {}, None, {1}),
        (WITHOUT_END, {"eos_token": "<turn|>"}, None, {1, END_OF_TURN}),
        (WITHOUT_END, {"eot_token": "<turn|>"}, None, {1, END_OF_TURN}),
        (WITHOUT_END, {"eos_token": {"content": "<turn|>", "lstrip": False}}, None, {1, END_OF_TURN}),
        (WITHOUT_END, {"eos_token": "<no such token>", "eot_token": None}, None, {1}),
        (TEMPLATE, {"eos_token": "<turn|>"}, {"eos_token_id": [1, 7]}, {1, 7}),
    ],
)
def test_what_ends_a_text(
    template: str, tokenizer_config: dict[str, Any], generation: dict[str, Any] | None, expected: set[int], target: Path
) -> None:
    (target / "chat_template.jinja").write_text(template)
    edit_json(target / "tokenizer_config.json", **tokenizer_config)
    if generation is not None:
        edit_json(target / "generation_config.json", **generation)
    assert set(special_tokens(target)[0].eos) == expected


def test_a_file_that_forgets_the_end_of_a_turn_is_warned_of(target: Path) -> None:
    edit_json(target / "generation_config.json", eos_token_id=1)
    (warning,) = special_tokens(target)[1]
    assert f"eos_token_id lacks {END_OF_TURN}, which the chat template writes after an answer" in warning
    edit_json(target / "generation_config.json", eos_token_id=[1, END_OF_TURN])
    assert not [*special_tokens(target)[1]]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("template", "names"),
    [
        (CHANNELS, ("<|channel>", "<channel|>")),
        (THINK, ("<think>", "</think>")),
        (WRITES_EMPTY_THOUGHTS, ("<think>", "</think>")),
        (TEMPLATE, ("<|channel>", "<channel|>")),
    ],
    ids=["channels", "think", "empty thoughts", "none"],
)
def test_marks_of_thoughts(special: bool, template: str, names: tuple[str, str], target: Path) -> None:
    (target / "chat_template.jinja").write_text(template)
    assert special_tokens(target)[0].channels == {}  # texts that are no tokens
    ids = add_tokens(target, special, *names)
    assert special_tokens(target)[0].channels == ({} if template is TEMPLATE else {"thought": tuple(ids)})


def test_a_begin_mark_that_nothing_tells_is_none(target: Path) -> None:
    """The template keeps what follows `</think>`, and names another added token, but no begin mark."""
    (target / "chat_template.jinja").write_text(THINK.replace("<think>", "<image>"))
    add_tokens(target, True, "<image>", "</think>")
    assert special_tokens(target)[0].channels == {}


def test_the_next_turns_mark_ends_nothing(target: Path) -> None:
    """This template refuses chats that end with an answer, and writes nothing after one."""
    end = "{%- if closed %}{{ '<turn|>\\n' }}{% endif %}"
    assert end in REFUSES_ENDING_WITH_ANSWER
    (target / "chat_template.jinja").write_text(REFUSES_ENDING_WITH_ANSWER.replace(end, ""))
    assert special_tokens(target)[0].eos == (1,)


def test_templates_see_the_names_of_the_tokenizers_config(target: Path) -> None:
    edit_json(
        target / "tokenizer_config.json",
        bos_token="<bos>",
        eos_token="<turn|>",
        image_token="<img>",
        pad_token=None,
        clean=True,
    )
    assert special_tokens(target)[0].names == {
        "bos_token": "<bos>",
        "eos_token": "<turn|>",
        "image_token": "<img>",
    }


def test_suppressed_tokens_are_never_generated(pair_dirs: Callable[[str], Directories], tmp_path: Path) -> None:
    """As in transformers, which masks them before anything else; plain and speculative, greedy and sampled."""
    directories = pair_dirs("tiny")
    target = Path(shutil.copytree(directories[0], tmp_path / "target"))
    prompt, suppressed = [3, 4, 5], [0, 1, 5, *range(20, 245), 255, 300]  # one is beyond the vocabulary
    edit_json(target / "generation_config.json", eos_token_id=1, suppress_tokens=suppressed)
    bundle = export(tmp_path / "bundle", target, directories[1], "onnx")
    assert json.loads((bundle / "manifest.json").read_text())["tokens"]["suppressed"] == suppressed
    decoder = open_decoder(bundle, threads=1)

    def ids(drafts: int, **options: Any) -> list[int]:
        stream = decoder.stream(prompt, max_new_tokens=40, num_draft_tokens=drafts, **options)
        return [token.id for token in stream]

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    free = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, suppress_tokens=None)
    assert set(free[0, len(prompt) :].tolist()) & set(suppressed), "nothing to suppress"
    assert ids(0) == expected
    checks = run_parity(bundle, open_pair(target, directories[1]), [prompt], 40)
    assert [check for check in checks if not check.passed] == []
    for options in ({}, {"temperature": 1.5, "seed": 4}):
        assert ids(0, **options) == ids(4, **options)
        assert not set(ids(4, **options)) & set(suppressed)


def test_the_repetition_penalty_is_the_checkpoints(pair_dirs: Callable[[str], Directories], tmp_path: Path) -> None:
    """As in transformers, greedy too; whoever sets one decides, and 1 is none."""
    directories = pair_dirs("tiny")
    target = Path(shutil.copytree(directories[0], tmp_path / "target"))
    edit_json(target / "generation_config.json", eos_token_id=1, repetition_penalty=1.4)
    bundle = export(tmp_path / "bundle", target, directories[1], "onnx")
    decoder, prompt = open_decoder(bundle, threads=1), [3, 4, 5]
    assert decoder.engine.manifest.repetition_penalty == 1.4

    def ids(drafts: int, **options: Any) -> list[int]:
        return [t.id for t in decoder.stream(prompt, max_new_tokens=40, num_draft_tokens=drafts, **options)]

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    expected, free = (
        model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, **more)[0, len(prompt) :].tolist()
        for more in ({}, {"repetition_penalty": 1.0})
    )
    assert ids(0) == ids(4) == expected != free
    assert ids(4, repetition_penalty=1) == free
    edit_json(target / "generation_config.json", repetition_penalty=0)
    with pytest.raises(InputError, match=r"generation_config.json: repetition penalty is 0.0, expected 0.01 to 100"):
        open_pair(target, directories[1])


def test_suppressing_every_token_is_refused(pair_dirs: Callable[[str], Directories], tmp_path: Path) -> None:
    target = Path(shutil.copytree(pair_dirs("tiny")[0], tmp_path / "target"))
    edit_json(target / "generation_config.json", suppress_tokens=[*range(256)])
    with pytest.raises(InputError, match="suppress_tokens names every token"):
        open_pair(target, pair_dirs("tiny")[1])


def test_every_key_of_the_reference_is_read_warned_of_or_ignored() -> None:
    assert {*vars(GenerationConfig())} <= READ_KEYS | UNSUPPORTED_KEYS.keys() | IGNORED_KEYS
    assert not READ_KEYS & UNSUPPORTED_KEYS.keys() and not IGNORED_KEYS & {*READ_KEYS, *UNSUPPORTED_KEYS}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_repetition_penalty": 1.1}, "encoder_repetition_penalty is 1.1, which runtimes do not have yet"),
        ({"min_p": 0.05, "do_sample": True}, "min_p is 0.05"),
        ({"min_p": 0.05}, None),  # greedy decoding does not read it
        ({"begin_suppress_tokens": [3]}, r"begin_suppress_tokens is [3]"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3"),
        ({"stop_strings": ["a"]}, "stop_strings is ['a']"),
        ({"num_beams": 4}, "num_beams is 4"),
        ({"do_sample": True, "top_k": 100}, "top_k is 100; a bundle gives 64 logits of a token"),
        ({"do_sample": True, "top_k": 0}, "top_k is 0; a bundle gives 64"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1; a bundle gives 64"),
        ({"color": "blue", "shape": None}, "color is not a key that transformers knows"),
        ({"repetition_penalty": 1.0, "min_p": None, "bad_words_ids": [], "num_beams": 1, "max_length": 20}, None),
        ({"do_sample": True, "top_k": 64, "transformers_version": "5"}, None),
    ],
)
def test_warnings(settings: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    edit_json(tmp_path / "generation_config.json", **settings)
    warnings = [*generation_warnings(tmp_path)]
    assert len(warnings) == (message is not None)
    assert message is None or message in warnings[0]


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_ids_that_are_none(key: str, target: Path) -> None:
    edit_json(target / "generation_config.json", **{"eos_token_id": [1, END_OF_TURN], key: -1})
    tokens, warnings = special_tokens(target)
    assert (tokens.bos, min(tokens.eos), tokens.pad) == (2, 1, 0)
    assert TURN not in tokens.eos
    assert f"{key} is -1, which is no token; it is ignored" in warnings[0]


def test_settings_in_config_json(target: Path) -> None:
    """Without generation_config.json, transformers takes them from there."""
    edit_json(target / "config.json", suppress_tokens=[9, 5], do_sample=True, top_k=7, num_beams=3)
    assert special_tokens(target)[0].suppressed == (5, 9)
    assert default_sampling(target) == Sampling(1.0, top_k=7)
    reference = GenerationConfig.from_pretrained(target, config_file_name="config.json", _from_model_config=True)
    assert (reference.suppress_tokens, reference.do_sample, reference.top_k) == ([9, 5], True, 7)
    (warning,) = generation_warnings(target)
    assert warning.startswith(f"{target / 'config.json'}: num_beams is 3, which runtimes do not have yet")
    assert not [*config_notes(target)]
    edit_json(target / "generation_config.json", eos_token_id=1)
    assert special_tokens(target)[0].suppressed == ()
    assert default_sampling(target) == Sampling()


@pytest.mark.parametrize(
    "places", [("special_tokens_map.json", None), ("tokenizer_config.json", "extra_special_tokens")]
)
def test_names_from_other_places(places: tuple[str, str | None], target: Path) -> None:
    file, section = places
    names = {"eot_token": "<turn|>", "image_token": {"content": "<img>"}}
    edit_json(target / file, **({section: names} if section else names))
    (target / "chat_template.jinja").write_text(WITHOUT_END)
    tokens, _ = special_tokens(target)
    assert tokens.names["image_token"] == "<img>"
    assert set(tokens.eos) == {1, END_OF_TURN}
