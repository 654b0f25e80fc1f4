"""Session files: a conversation that is saved and opened goes on as if it had not been closed; others are refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from runtime_ref.cache import Cache
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength, Plan
from runtime_ref.errors import InputError
from runtime_ref.manifest import KVBuffer
from runtime_ref.session_file import Session, open_session, save_session
from runtime_ref.streaming import Decoder, open_decoder
from tests.runtime_ref.fake_graphs import MAX_DRAFTS, VOCAB, continuation, fake_decoder


@pytest.mark.parametrize("seed", range(15))
def test_saved_and_opened_at_any_time(seed: int, tmp_path: Path) -> None:
    """In the middle of texts, after rejected drafts, before and after windows move; the fake graphs check every row."""
    random, file = np.random.default_rng(seed), tmp_path / "session"
    opened, kept = fake_decoder(), fake_decoder()
    conversation, never_closed = opened.conversation(), kept.conversation()
    text: list[int] = []
    for turn in range(12):
        new = random.integers(0, VOCAB, random.integers(1, 120)).tolist()
        prompt = [*text[: len(text) if random.random() < 0.8 else random.integers(0, len(text) + 1)], *new][:900]
        count, drafts = int(random.integers(1, 40)), [0, 3, 7][random.integers(3)]  # None goes by measured times
        streams = [
            one.stream(prompt, max_new_tokens=40, num_draft_tokens=drafts) for one in (conversation, never_closed)
        ]
        for stream in streams:
            for _ in range(count):
                next(stream)
        text = [*prompt, *continuation(prompt, count)]
        assert [*streams[0].prompt, *streams[0].tokens] == text
        assert conversation.cache.tokens == never_closed.cache.tokens
        assert streams[0].stats.reused_tokens == streams[1].stats.reused_tokens
        if random.random() < 0.7:
            conversation.save(file)
            content, before = file.read_bytes(), conversation.cache
            assert len(content) % 4 == 0
            opened = [opened, fake_decoder()][turn % 2]
            conversation = opened.open_session(file)
            assert conversation.cache.tokens == before.tokens
            assert conversation.cache.window_start == before.window_start
            conversation.save(tmp_path / "again")
            assert metadata(tmp_path / "again").keys() == metadata(file).keys()
            if turn % 2:
                assert (tmp_path / "again").read_bytes() == content
    assert file.read_bytes() == content


def metadata(file: Path) -> dict[str, str]:
    with safetensors.safe_open(file, "np") as opened:
        return opened.metadata()


def saved(tmp_path: Path, tokens: int = 300, decoder: Decoder | None = None) -> Path:
    """A session of so many tokens, of which the last few are an answer's, with rejected drafts behind them."""
    conversation = (decoder or fake_decoder()).conversation()
    if tokens:
        prompt = (np.arange(tokens - 10) % VOCAB).tolist()
        list(conversation.stream(prompt, max_new_tokens=11, num_draft_tokens=4))
        assert conversation.position == tokens
    conversation.messages = [{"role": "user", "content": "a"}]
    conversation.save(tmp_path / "session")
    return tmp_path / "session"


def test_what_the_library_reads(tmp_path: Path) -> None:
    """Rows of rejected drafts, and of nothing yet, are zeros; sizes and places are those of FORMAT.md."""
    file = saved(tmp_path)
    tensors, texts = load_file(file), metadata(file)
    text = (np.arange(290) % VOCAB).tolist()
    text += continuation(text, 10)
    assert (tensors["tokens"].dtype, tensors["tokens"].tolist()) == (np.int32, text)
    assert texts.keys() == {"format", "version", "bundle", "max_seq_len", "window_start", "planner", "messages"}
    assert (texts["format"], texts["version"], texts["bundle"]) == ("gemma-mtp-session", "1", "0" * 64)
    start = int(texts["window_start"])
    assert start == 128
    assert [tensors[name].shape for name in ("full", "sliding")] == [(1, 512, 1), (1, 256, 1)]
    for name, first in (("full", 0), ("sliding", start)):
        rows = tensors[name][0, :, 0]
        assert rows[: 300 - first].tolist() == text[first:]
        assert not rows[300 - first :].any()
    content = file.read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 4096 == 0
    assert len(content) == 4096 + 4 * (512 + 256 + 300)
    assert json.loads(texts["messages"]) == [{"role": "user", "content": "a"}]


def test_a_file_that_the_library_wrote_is_opened(tmp_path: Path) -> None:
    """Its data begins at another place and has another order."""
    file = saved(tmp_path)
    save_file(load_file(file), tmp_path / "other", metadata(file))
    assert (tmp_path / "other").stat().st_size < file.stat().st_size
    conversation = fake_decoder().open_session(tmp_path / "other")
    assert conversation.messages == [{"role": "user", "content": "a"}]
    prompt = [*conversation.cache.tokens, 3]
    stream = conversation.stream(prompt, max_new_tokens=9, num_draft_tokens=2)
    assert [token.id for token in stream] == continuation(prompt, 9)
    assert stream.stats.reused_tokens == 300


@pytest.mark.parametrize("tokens", [0, 11, 255, 256, 257])
def test_sizes_at_the_edges(tokens: int, tmp_path: Path) -> None:
    conversation = fake_decoder().open_session(saved(tmp_path, tokens))
    assert conversation.position == tokens
    assert conversation.cache.buffers["full"].shape[1] == -(-tokens // 256) * 256
    prompt = [*conversation.cache.tokens, 3, 4]
    assert [token.id for token in conversation.stream(prompt, max_new_tokens=9)] == continuation(prompt, 9)


def test_a_text_that_was_thrown_away_after_its_window_moved(tmp_path: Path) -> None:
    """As after Ctrl-C in the first chunk of another prompt: nothing is valid, and the next text begins at 0."""
    conversation = fake_decoder().conversation()
    list(conversation.stream([1] * 300, max_new_tokens=2))
    conversation.cache.roll_back(0)
    assert conversation.cache.window_start > 0
    conversation.save(tmp_path / "session")
    opened = fake_decoder().open_session(tmp_path / "session")
    assert (opened.position, opened.cache.window_start, opened.num_bytes) == (0, 0, 0)
    assert [token.id for token in opened.stream([1, 2], max_new_tokens=5)] == continuation([1, 2], 5)


def test_buffers_of_other_dtypes_and_layouts(tmp_path: Path) -> None:
    """float32 is ahead of float16, so that each begins at a multiple of its item size, whatever the sizes are."""
    rows_first = ("rows", "num_key_value_heads", "head_dim")
    kv = (
        KVBuffer("a", 0, "sliding_attention", 1, 3, "float16"),
        KVBuffer("b", 1, "full_attention", 2, 1, "float16", rows_first),
        KVBuffer("c", 2, "full_attention", 2, 5),
    )
    limits = {"cache_rows": 301, "window_rows": 301}
    manifest: Any = SimpleNamespace(
        kv=kv, limits=limits, hidden_size=1, sliding_window=400, max_seq_len=300, vocab_size=9, digest="d"
    )
    cache, random = Cache(manifest), np.random.default_rng(0)
    cache.tokens = random.integers(0, 9, 290).tolist()
    cache.buffers = {entry.name: random.standard_normal(entry.shape(301)).astype(entry.dtype) for entry in kv}
    save_session(tmp_path / "session", Session(cache, {}))
    assert [*load_file(tmp_path / "session")] != []
    read = open_session(tmp_path / "session", manifest)
    assert read.cache.tokens == cache.tokens and read.messages is None
    for entry in kv:
        now, then = (np.moveaxis(one.buffers[entry.name], entry.rows_axis, 0) for one in (read.cache, cache))
        assert now.dtype == entry.dtype and now.shape[0] == 301
        assert np.array_equal(now[:290], then[:290])
        assert not now[290:].any()
        read.cache.buffers[entry.name][:] = 1  # in memory alone
    assert np.array_equal(
        open_session(tmp_path / "session", manifest).cache.buffers["c"][:, :290], cache.buffers["c"][:, :290]
    )


def test_the_planner_goes_on(tmp_path: Path) -> None:
    """One that has learned nothing takes over what was learned; another's is newer."""
    decoder, fresh, busy = fake_decoder(), fake_decoder(), fake_decoder()
    for accepted in (3, 0, 5, 1, 1):
        decoder.planner.learn("drafter", 6, accepted)
        decoder.planner.learn("lookup of 2", accepted, accepted)
        decoder.planner.record_loss(Plan("drafter", 6), accepted + 1, 6)
    file, learned = saved(tmp_path, decoder=decoder), decoder.planner.as_dict()
    assert fresh.planner.is_new and not decoder.planner.is_new
    fresh.open_session(file)
    assert fresh.planner.as_dict() == learned
    reached = (planner._sources["drafter"].reached for planner in (fresh.planner, decoder.planner))
    assert next(reached) == next(reached)
    busy.planner.learn("drafter", 2, 1)
    before = busy.planner.as_dict()
    busy.open_session(file)
    assert busy.planner.as_dict() == before != learned


def replaced(file: Path, change: Callable[[dict[str, Any]], object], data: Callable[[bytes], bytes] = bytes) -> None:
    """Give a session another header and data."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data(content[8 + size :]))


def in_metadata(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update(values)


def in_planner(**values: Any) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        planner = json.loads(header["__metadata__"]["planner"])
        planner["sources"] = {"drafter": DraftLength(MAX_DRAFTS, Costs(1))._acceptance("drafter").as_dict()}
        (planner if "loss_passes" in values else planner["sources"]["drafter"]).update(values)
        header["__metadata__"]["planner"] = json.dumps(planner)

    return change


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.pop(name)


def in_tensor(name: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_metadata(format="pt"), "not a session file .its format is 'pt', expected 'gemma-mtp-session'"),
        (without("__metadata__"), "not a session file .*__metadata__"),
        (in_metadata(version="2"), "version of its format is '2', this version reads '1'; update it"),
        (in_metadata(version="x"), "version of its format is 'x', this version reads '1'; run the prompt again"),
        (
            in_metadata(bundle="1" * 64),
            f"another bundle, whose manifest has the sha256 '{'1' * 64}', expected 000.*again",
        ),
        (in_metadata(window_start="127"), "window_start is 127, which no conversation of 300 tokens has"),
        (in_metadata(window_start="384"), "window_start is 384, which no conversation of 300 tokens has"),
        (in_metadata(window_start="-128"), "window_start is '-128', expected a whole number"),
        (in_metadata(planner="{"), "malformed"),
        (in_metadata(planner="[]"), "planner is no object"),
        (in_metadata(planner="{}"), "'loss_passes' is missing"),
        (in_planner(loss_passes=-17), "-17 is out of range"),
        (in_planner(loss_passes=float("nan")), "NaN is no JSON"),
        (in_planner(accepted=[[0.0] * 6] * 2), "acceptance has other sizes"),
        (in_planner(rejected=[[-1.0] * 7] * 2), "-1.0 is out of range"),
        (in_planner(scores=[1.0, 0.0]), "-1.0 is out of range"),
        (in_planner(scores=["0", 0.0]), "malformed"),
        (in_metadata(messages="3"), "messages are no list of objects"),
        (in_metadata(messages='["a"]'), "messages are no list of objects"),
        (in_metadata(more=3), "metadata are not texts"),
        (without("full"), "tensor 'full' is missing"),
        (lambda header: header.update(extra=header["full"]), "tensor 'extra' is not expected"),
        (in_tensor("full", dtype="F16"), "tensor full is .'F16', .1, 512, 1.. of 2048 bytes, expected F32"),
        (in_tensor("full", shape=[1, 256, 1]), "expected F32 .1, 512, 1"),
        (in_tensor("full", data_offsets=[0, 2044]), "of 2044 bytes"),
        (in_tensor("sliding", data_offsets=[0, 1024]), "leave out or share bytes"),
        (in_tensor("sliding", data_offsets=[4096, 5120]), "leave out or share bytes"),
        (in_tensor("tokens", dtype="I64"), "tensor tokens"),
        (in_tensor("tokens", shape=[1001]), "there are 1001 tokens, the bundle's context has 1000"),
        (in_tensor("tokens", shape=[]), "malformed"),
        (in_tensor("tokens", shape=3), "malformed"),
        (in_tensor("full", data_offsets=None), "malformed"),
        (in_metadata(messages="[" * 100_000), "malformed .maximum recursion"),
        (without("tokens"), "'tokens' is missing"),
    ],
)
def test_refusals(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    file = saved(tmp_path)
    replaced(file, lambda header: None)
    fake_decoder().open_session(file)
    replaced(file, change)
    with pytest.raises(InputError, match=rf"^{file}: .*{message}") as caught:
        fake_decoder().open_session(file)
    assert "again" in str(caught.value) or "update it" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda data: data[:-1], r"the file has \d+ bytes, its header says \d+"),
        (lambda data: data + b"x", r"the file has \d+ bytes, its header says \d+"),
        (lambda data: data[:-4] + np.array([VOCAB], "<i4").tobytes(), "ids that are not between 0 and 16"),
        (lambda data: data[:-4] + np.array([-1], "<i4").tobytes(), "ids that are not between 0 and 16"),
    ],
)
def test_refusals_of_data(data: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    file = saved(tmp_path)
    replaced(file, lambda header: None, data)
    with pytest.raises(InputError, match=message):
        fake_decoder().open_session(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected at least 8"),
        (b"\xff" * 7, "7 bytes, expected at least 8"),
        (b"\xff" * 8, "its header has 18446744073709551615 bytes of 0"),
        (b"\x00\x00\x00\x02" + bytes(4) + b" " * 100, "its header has 33554432 bytes of 100"),
        (b"\x02" + bytes(7) + b"[]", "its header is no object"),
        (b"\x02" + bytes(7) + b"\xff\xff", "not a session file"),
        (b"\x15" + bytes(7) + b'{"a": {}, "a": {}}   ', "the key 'a' is there twice"),
    ],
)
def test_no_session_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "session").write_bytes(content)
    with pytest.raises(InputError, match=message):
        fake_decoder().open_session(tmp_path / "session")


@pytest.mark.parametrize(
    ("path", "message"), [("none", "not found"), (".", "is not a file"), ("a\0b", "null|embedded")]
)
def test_no_file(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fake_decoder().open_session(tmp_path / path)
    with pytest.raises(InputError, match="expected the path of a file"):
        fake_decoder().open_session(3)  # type: ignore[arg-type]
    conversation = fake_decoder().conversation()
    unread: tuple[Any, ...] = ([{"a": object()}], [1], "abc", {"a": 1}, [{1: 0, "1": 0}], [{"a": float("nan")}])
    for conversation.messages in unread:  # what could not be opened is not saved
        with pytest.raises(InputError, match="messages of a session are not objects of JSON"):
            conversation.save(tmp_path / "b")
    with pytest.raises(InputError, match="the session cannot be written"):
        fake_decoder().conversation().save(tmp_path / "none" / "b")
    assert [*tmp_path.iterdir()] == []


KILLED = """
import os, sys
from pathlib import Path
from tests.runtime_ref.fake_graphs import fake_decoder
file = Path(sys.argv[1])
conversation = fake_decoder().conversation()
list(conversation.stream([1, 2, 3], max_new_tokens=4))
old = file.read_bytes()
conversation.save(file.with_name("new"))
new = file.with_name("new").read_bytes()
file.with_name("new").unlink()
lines, ended, seen = 0, False, set()
while not ended:
    lines += 1
    if not (child := os.fork()):
        left = lines
        def trace(frame, event, argument):
            global left
            if not frame.f_code.co_filename.endswith(("session_file.py", "locks.py")):
                return None
            left -= event == "line"
            if left == 0:
                os._exit(9)
            return trace
        sys.settrace(trace)
        conversation.save(file)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    content = file.read_bytes()
    seen.add({old: "old", new: "new"}[content])
    if content == new and not ended:
        file.write_bytes(old)
    if lines % 7 == 0:
        conversation.save(file)
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        file.write_bytes(old)
print(lines, *sorted(seen))
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Before each line in turn: the file is the old one or the new one, and the next save removes what was left."""
    file = saved(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines, *seen = done.stdout.split()
    assert int(lines) > 60 and seen == ["new", "old"]


@pytest.mark.parametrize("name", ["os.fsync", "pathlib.Path.replace", "numpy.array"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_errors_while_saving(name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    file, decoder = saved(tmp_path), fake_decoder()
    content = file.read_bytes()
    list(decoder.stream([1, 2], max_new_tokens=3))
    conversation = decoder._own
    with monkeypatch.context() as patch, pytest.raises((InputError, KeyboardInterrupt)) as caught:
        patch.setattr(name, fail)
        conversation.save(file)
    if isinstance(caught.value, InputError):
        assert str(caught.value).startswith(f"{file}: the session cannot be written (No space left on device); free")
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["session"]


def test_a_bundle_goes_on_to_the_last_bit(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Past the window, with rejected drafts: tokens and log-probabilities are those of a decoder that stayed open."""
    prompt = np.random.default_rng(0).integers(3, 2000, 430).tolist()
    options: dict[str, Any] = {"num_draft_tokens": 4, "temperature": 1.0, "seed": 3}
    with open_decoder(bundle("demo"), threads=1) as decoder:
        conversation = decoder.conversation()
        first = [token.id for token in conversation.stream(prompt, max_new_tokens=9, **options)]
        conversation.save(tmp_path / "session")
        longer = [*prompt, *first, *prompt[:90]]
        expected = list(conversation.stream(longer, max_new_tokens=30, **options))
    content = (tmp_path / "session").read_bytes()
    assert load_file(tmp_path / "session")["tokens"].tolist() == [*prompt, *first[:-1]]
    with open_decoder(bundle("demo"), threads=1) as decoder:
        opened = decoder.open_session(tmp_path / "session")
        stream = opened.stream(longer, max_new_tokens=30, **options)
        assert list(stream) == expected
        assert stream.stats.reused_tokens == len(prompt) + 8
        assert opened.cache.window_start > 0
        assert (tmp_path / "session").read_bytes() == content
        opened.save(tmp_path / "session")  # while it is mapped
        assert decoder.open_session(tmp_path / "session").cache.tokens == [*longer, *stream.tokens[:-1]]
    with open_decoder(bundle("tiny"), threads=1) as other, pytest.raises(InputError, match="saved with another bundle"):
        other.open_session(tmp_path / "session")
