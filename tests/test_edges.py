"""Whatever files and arguments hold, what comes of it is a result, or one line that says what is wrong.

`make fuzz` runs many more examples than the tests do.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from exporter.bench.measure import decode_weights, two_stage_ratio, versions
from exporter.bundle.inspection import inspect
from exporter.checkpoint.pair import Pair, open_pair
from exporter.modeling.target import empty_kv
from exporter.parity.source import open_source
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, read_manifest
from runtime_ref.streaming import Decoder, open_decoder
from tests.conftest import Directories
from tests.edges import VALUES, spoilt
from tests.runtime_ref.fake_graphs import fake_decoder

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=FIXTURES, derandomize=EXAMPLES <= 25, database=None
)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Let the block succeed, or raise an InputError of one line."""
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) > 10


def dump(document: Any) -> bytes:
    """JSON as other programs write it, NaN and lone surrogates among it."""
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def pair(pair_dirs: Callable[[str], Directories], tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Copies of a tiny target and drafter, with every file that is read."""
    directory = tmp_path_factory.mktemp("pair")
    for source, name in zip(pair_dirs("e2b"), ("target", "drafter"), strict=True):
        shutil.copytree(source, directory / name)
    target = directory / "target"
    shutil.copyfile("exporter/demo/pair/target/tokenizer.json", target / "tokenizer.json")
    tokens = {"eos_token": "<eos>", "eot_token": {"content": "<bos>"}, "bos_token": "<bos>", "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(tokens))
    (target / "generation_config.json").write_text(json.dumps(GENERATION))
    return target, directory / "drafter"


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
GENERATION = {
    **{"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
    **{"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0, "suppress_tokens": [7, 8]},
}


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """Give a file another content while the block runs."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


FILES = (
    *("target/config.json", "drafter/config.json", "target/generation_config.json", "target/tokenizer_config.json"),
    "target/tokenizer.json",
)


@pytest.mark.parametrize("name", FILES)
@fuzz
@given(data=st.data())
def test_checkpoints_with_a_spoilt_file(name: str, data: st.DataObject, pair: Directories) -> None:
    file = pair[0].parent / name
    document = data.draw(spoilt(json.loads(file.read_text(encoding="utf-8"))))
    with replaced(file, dump(document)), one_line():
        opened = open_pair(*pair)
        assert all("\n" not in warning for warning in opened.warnings)
        if name == "target/config.json":
            assert_logits_of_the_reference(opened)


def assert_logits_of_the_reference(pair: Pair) -> None:
    """Where transformers loads the checkpoint as well, it computes the same."""
    try:
        model = AutoModelForCausalLM.from_pretrained(pair.target_checkpoint.directory, dtype=torch.float32)
        tokens = torch.tensor([2, 77, 130, 9, 30, 31, 32, 33])
        expected = model(tokens[None]).logits[0]
    except Exception:  # it raises whatever a value leads to
        return
    kv = empty_kv(pair.target, 8)
    pair = replace(pair, tokens=replace(pair.tokens, suppressed=()))
    logits = pair.load_target()(tokens, torch.tensor([0]), torch.arange(8), kv).logits
    assert (logits - expected).abs().max() < 1e-4 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("name", [*FILES, "target/model.safetensors"])
@fuzz
@given(data=st.data())
def test_checkpoints_with_a_file_of_other_bytes(name: str, data: st.DataObject, pair: Directories) -> None:
    file = pair[0].parent / name
    before = file.read_bytes()
    at = data.draw(st.integers(0, min(len(before), 3000)))
    content = data.draw(
        st.one_of(
            st.binary(max_size=60),
            st.just(before[:at]),
            st.binary(min_size=1, max_size=8).map(lambda new: before[:at] + new + before[at + len(new) :]),
        )
    )
    with replaced(file, content), one_line():
        open_pair(*pair)


@fuzz
@given(data=st.data())
def test_checkpoints_with_a_spoilt_header(data: st.DataObject, pair: Directories) -> None:
    file = pair[0] / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = dump(data.draw(spoilt(json.loads(content[8 : 8 + size]))))
    with replaced(file, len(header).to_bytes(8, "little") + header + content[8 + size :]), one_line():
        open_pair(*pair)


@pytest.fixture(scope="module")
def copy(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(bundle("tiny"), tmp_path_factory.mktemp("copy") / "bundle"))


@fuzz
@given(data=st.data())
def test_bundles_with_a_spoilt_manifest(
    data: st.DataObject, copy: Path, pair_dirs: Callable[[str], Directories]
) -> None:
    """What every command reads of a manifest, and a text with it if it is taken."""
    file = copy / MANIFEST
    with replaced(file, dump(data.draw(spoilt(json.loads(file.read_text()))))):
        for read in (inspect, lambda path: open_source(path, *pair_dirs("tiny")), _as_bench_does, _generate):
            with one_line():
                read(copy)


def _as_bench_does(path: Path) -> None:
    manifest = read_manifest(path)
    load_engine(path, manifest, 1)
    decode_weights(manifest), two_stage_ratio(manifest), versions(manifest)


def _generate(path: Path) -> None:
    manifest = read_manifest(path)
    planner = DraftLength(manifest.max_draft_tokens, Costs(manifest.max_draft_tokens, manifest.row_multiple))
    decoder = Decoder(path, load_engine(path, manifest, 1), None, planner)
    for drafts in (min(2, manifest.max_draft_tokens), None):
        for _ in decoder.stream([3, 4, 5], max_new_tokens=4, num_draft_tokens=drafts):
            pass


@pytest.fixture(scope="module")
def decoder(chat_bundle: Path) -> Decoder:
    return open_decoder(chat_bundle, threads=1)


ANYTHING = st.one_of(
    st.sampled_from(VALUES), st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists)
)

OPTIONS = (
    *("max_new_tokens", "num_draft_tokens", "temperature", "top_p", "top_k", "seed", "stop", "suppress", "logit_bias"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "json_schema", "regex", "progress"),
)


@fuzz
@given(
    prompt=st.one_of(st.lists(st.integers(-1, 2100), max_size=5), st.text(max_size=9), ANYTHING),
    options=st.dictionaries(
        st.sampled_from(OPTIONS),
        st.one_of(
            *(ANYTHING, st.integers(0, 9), st.floats(0, 2), st.lists(st.text(min_size=1), max_size=2)),
            *(st.dictionaries(st.integers(0, 300), st.floats(-100, 100)), st.text("ab(|)*[]^{,2}\\\\.?+", max_size=12)),
            spoilt({"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]}),
        ),
    ),
)
def test_streams_of_any_arguments(prompt: Any, options: dict[str, Any], decoder: Decoder) -> None:
    with one_line():
        stream = decoder.stream(prompt, **options)
        for _ in range(4):
            next(stream, None)
        assert stream.stats.tokens <= len(stream.tokens) <= 4


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system")), "content": st.text(max_size=9)}
)


@fuzz
@given(messages=st.one_of(st.lists(MESSAGE, max_size=4), spoilt([{"role": "user", "content": "a"}] * 3), ANYTHING))
def test_chats_of_any_messages(messages: Any, decoder: Decoder) -> None:
    with one_line():
        next(decoder.chat(messages), None)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A session of 300 tokens, past a sliding window, with a message and what the planner has learned."""
    file, decoder = tmp_path_factory.mktemp("session") / "session", fake_decoder()
    conversation = decoder.conversation()
    list(conversation.stream([3] * 290, max_new_tokens=11))
    decoder.planner.learn("drafter", 4, 2)
    conversation.messages = [{"role": "user", "content": "a"}]
    conversation.save(file)
    return file, file.read_bytes()


@fuzz
@given(data=st.data())
def test_spoilt_sessions(data: st.DataObject, session: tuple[Path, bytes]) -> None:
    """Other bytes of the header, other values in it, or another length: one line, or a session with as many tokens."""
    file, content = session
    size = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + size])
    way = data.draw(st.sampled_from(["byte", "length", "header", "planner", "messages"]))
    if way == "byte":
        at = data.draw(st.integers(0, 7 + len(content[8 : 8 + size].rstrip())))
        content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    elif way == "length":
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        if way == "header":
            document = data.draw(spoilt(document))
        else:
            texts = document["__metadata__"]
            texts[way] = dump(data.draw(spoilt(json.loads(texts[way])))).decode()
        header = dump(document).ljust(size)
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    with replaced(file, content), one_line():
        conversation = fake_decoder().open_session(file)
        assert conversation.position == 300
        conversation.save(file)
