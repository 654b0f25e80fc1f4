"""The interface for applications: the examples of its README, and what it promises."""

import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.demo import PAIR
from runtime_ref.acceptance import Round
from runtime_ref.errors import InputError
from runtime_ref.sampling import MAX_TOP_K
from runtime_ref.streaming import Decoder, open_decoder
from runtime_ref.text_stream import TextStream
from runtime_ref.token_stream import Stream
from tests.pairs import load_reference

PAGE = Path(__file__).parents[2] / "runtime_ref" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
PROMPT = "Return the"


@pytest.fixture
def decoder(bundle: Callable[[str], Path], tmp_path: Path) -> Decoder:
    shutil.copytree(bundle("demo"), tmp_path / "bundle")
    return open_decoder(tmp_path / "bundle", threads=1)


def test_examples_run(bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundle("demo"), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 15
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.device", "chat.session"]


@pytest.mark.parametrize("drafts", [0, 3, None])
def test_what_is_shared_with_the_last_text_is_not_run_again(decoder: Decoder, drafts: int | None) -> None:
    def answer(prompt: list[int], *, fresh: bool) -> tuple[list[int], int]:
        if fresh:
            decoder.forget()
        stream = decoder.stream(prompt, max_new_tokens=20, num_draft_tokens=drafts, temperature=1.0, seed=3)
        return [token.id for token in stream], stream.stats.reused_tokens

    start = np.random.default_rng(0).integers(3, 2000, 90).tolist()  # longer than the window of 64
    first, reused = answer(start, fresh=True)
    assert reused == 0
    longer = [*start, *first, 5, 6, 7]
    again = answer(longer, fresh=False)
    assert again[1] >= len(start) + len(first) - 1
    assert again[0] == answer(longer, fresh=True)[0]
    branch = [*start[:80], 9]
    assert answer(branch, fresh=False)[1] == 80
    assert answer(branch, fresh=False)[0] == answer(branch, fresh=True)[0]
    assert answer(branch, fresh=False)[1] == len(branch) - 1  # the last token is always run


def test_rows_that_moved_away_are_run_again(decoder: Decoder) -> None:
    """Sliding layers drop rows that no later token attends to; a prompt that needs them is run as a whole."""
    text = np.random.default_rng(1).integers(3, 2000, 450).tolist()
    list(decoder.stream(text, max_new_tokens=2))
    short = [*text[:30], 4]
    assert not decoder.engine.cache.can_resume(30)
    stream = decoder.stream(short, max_new_tokens=6, num_draft_tokens=2)
    tokens = [token.id for token in stream]
    assert stream.stats.reused_tokens == 0
    decoder.forget()
    assert tokens == [token.id for token in decoder.stream(short, max_new_tokens=6)]


def test_a_text_left_early_does_not_change_the_next(decoder: Decoder) -> None:
    expected = [token.id for token in decoder.stream(PROMPT, max_new_tokens=12)]
    decoder.forget()
    for count in (0, 1, 4):
        stream = decoder.stream(PROMPT, max_new_tokens=12, num_draft_tokens=4)
        for _ in range(count):
            next(stream)
        assert [token.id for token in decoder.stream(PROMPT, max_new_tokens=12)] == expected
        with pytest.raises(RuntimeError, match="another text was started"):
            next(stream)


@pytest.mark.parametrize("drafts", [0, 4])
def test_cancelled_from_another_thread(decoder: Decoder, drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text ends with the round that runs when it is cancelled."""
    whole = [token.id for token in decoder.stream(PROMPT, max_new_tokens=60, num_draft_tokens=drafts)]
    decoder.forget()
    stream = decoder.stream(PROMPT, max_new_tokens=60, num_draft_tokens=drafts)
    real, rounds = decoder.engine.verify, []

    def verify(*arguments: Any) -> Round:
        rounds.append(real(*arguments))
        if len(rounds) == 3:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()
        return rounds[-1]

    monkeypatch.setattr(decoder.engine, "verify", verify)
    tokens = [token.id for token in stream]
    assert stream.stats.finish_reason == "cancelled"
    assert len(rounds) == 3
    assert tokens == whole[: 1 + sum(len(done.tokens) for done in rounds)]
    assert len(tokens) < len(whole)


def test_texts_of_streams_are_whole(decoder: Decoder) -> None:
    assert decoder.tokenizer is not None
    for seed in range(5):
        stream = decoder.stream(PROMPT, max_new_tokens=40, temperature=3.0, seed=seed)
        text = "".join(token.text for token in stream)
        assert text == stream.text == decoder.tokenizer.decode(stream.prompt + stream.tokens)[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [0.0, 1.5], ids=["greedy", "sampled"])
def test_log_probabilities_are_the_targets(decoder: Decoder, temperature: float) -> None:
    """Among the 64 largest logits that the reference implementation gives for the same text, at temperature 1."""
    reference, _ = load_reference(PAIR / "target", PAIR / "drafter")
    logprobs = []
    for drafts in (0, 4):
        stream = decoder.stream(PROMPT, max_new_tokens=20, num_draft_tokens=drafts, temperature=temperature, seed=5)
        tokens = list(stream)
        text = torch.tensor([[*stream.prompt, *stream.tokens]])
        logits = reference(text).logits[0, len(stream.prompt) - 1 : -1].double()
        excluded = logits.log_softmax(-1).exp().sort(-1, descending=True).values[:, MAX_TOP_K:].sum(-1)
        expected = logits.log_softmax(-1) - (1 - excluded).log()[:, None]
        actual = [token.logprob for token in tokens]
        assert actual == pytest.approx(expected[range(len(tokens)), stream.tokens].tolist(), abs=1e-4)
        assert min(actual) < -0.5
        logprobs.append(actual)
    assert logprobs[0] == logprobs[1]


def test_costs_that_cannot_be_saved_are_no_error(
    decoder: Decoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "costs.json")

    monkeypatch.setattr("runtime_ref.costs.write_whole", full)
    for _ in range(2):
        assert list(decoder.stream(PROMPT, max_new_tokens=4))
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "costs are not saved: costs.json: No space left on device"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"temperature": -1.0}, r"temperature is -1.0"),
        ({"top_k": 65}, "top-k is 65"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "expected 0 to"),
        ({"num_draft_tokens": 9}, "exported for up to 8"),
        ({"num_draft_tokens": -1}, "-1 draft tokens"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused_at_once(decoder: Decoder, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder.stream(PROMPT, **options)


def pieces(stop: list[str], *tokens: str) -> tuple[list[str], bool]:
    """Texts returned for tokens that are these strings, and whether a stop string came."""
    stream = TextStream(lambda ids, special=False: "".join(tokens[i] for i in ids), stop)
    texts = []
    for i in range(len(tokens)):
        texts.append(stream.add(i, last=i == len(tokens) - 1).text)
        if stream.stopped:
            break
    return texts, stream.stopped


def test_stop_strings() -> None:
    assert pieces(["END"], "a", "E", "N", "D", "b") == (["a", "", "", ""], True)
    assert pieces(["END"], "a", "E", "N", "E", "c") == (["a", "", "", "EN", "Ec"], False)
    assert pieces(["END"], "a", "EN") == (["a", "EN"], False)
    assert pieces(["END", "x"], "abxEND") == (["ab"], True)
    assert pieces(["aab"], "a", "a", "a", "b", "c") == (["", "", "a", ""], True)
    assert pieces([], "a", "b") == (["a", "b"], False)


def assert_counts_what_was_given_out(stream: Stream) -> None:
    """Tokens after the prefill's are accepted drafts or bonus tokens of rounds, of which the last may be cut off."""
    stats, given = stream.stats, len(stream.tokens)
    assert stats.tokens == given - 1
    assert stats.rounds + stats.accepted - (given - 1) in (0, 1)
    assert stats.accepted == sum(stats.accepted_by_position) == sum(s.accepted for s in stats.sources.values())
    assert stats.mean_tokens_per_round == ((given - 1) / stats.rounds if stats.rounds else None)


@pytest.mark.parametrize("drafts", [0, 4, None])
def test_counts_are_of_the_tokens_that_were_given_out(decoder: Decoder, drafts: int | None) -> None:
    """However the text ends: cancelled or left at any token, also inside a round, or at a stop string."""
    whole = [*decoder.stream(PROMPT, max_new_tokens=40, num_draft_tokens=drafts)]
    for count in range(1, len(whole) + 1):
        cancelled = decoder.stream(PROMPT, max_new_tokens=40, num_draft_tokens=drafts)
        for _ in range(count - 1):
            next(cancelled)
            assert cancelled.stats.finish_reason == ""
            assert_counts_what_was_given_out(cancelled)
        cancelled.cancel()
        if count > 1:
            assert len([*cancelled]) == 1
            assert_counts_what_was_given_out(cancelled)
            # A text that ends by itself with this token was not cancelled.
            assert cancelled.stats.finish_reason == ("eos" if count == len(whole) else "cancelled")
        stop = whole[count - 1].text
        if stop.strip():
            stopped = decoder.stream(PROMPT, max_new_tokens=40, num_draft_tokens=drafts, stop=[stop])
            assert len([*stopped]) <= count
            assert stopped.stats.finish_reason == "stop"
            assert_counts_what_was_given_out(stopped)
