"""A full context: the text ends, or its oldest part is left out; drafts change no token, and nothing is lost."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_ref.acceptance import common_prefix
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.errors import InputError
from runtime_ref.full_context import ChatShift
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import Decoder, open_decoder
from runtime_ref.token_stream import Stream
from tests.runtime_ref.fake_graphs import continuation, fake_decoder
from tests.runtime_ref.hashed import HashedEngine
from tests.vectors import make_full_context

VECTORS = json.loads(make_full_context.FILE.read_text())
CONTEXT = 64
PROMPT = [2, 5, 9, 11, 4]


def shifted(prompt: Sequence[int], count: int) -> list[int]:
    """What plain decoding gives if the first and the newest tokens stay, up to half of the context."""
    text, new = list(prompt), list[int]()
    for _ in range(count):
        if len(text) == CONTEXT:
            text = [text[0], *text[len(text) - CONTEXT // 2 + 1 :]]
        new += continuation(text, 1)
        text.append(new[-1])
    return new


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 5, 7, None])
def test_a_shifted_text_is_that_of_plain_decoding(num_draft_tokens: int | None) -> None:
    for length in range(1, CONTEXT, 9):
        prompt = [2, *continuation(PROMPT, length - 1)]
        decoder = fake_decoder(CONTEXT)
        stream = decoder.stream(prompt, max_new_tokens=200, num_draft_tokens=num_draft_tokens, when_full="shift")
        left = [stream.tokens_left for _ in stream]
        assert stream.tokens == shifted(prompt, 200)
        assert stream.stats.finish_reason == "length"
        assert sum(stream.stats.drafted_lengths.values()) == stream.stats.rounds
        assert stream.stats.tokens + 1 + left.count(0) == 200  # each prefill gives a token that is no round's
        # It falls by one a token, to 0, and then half of the context is free but for the next token.
        steps = [CONTEXT - length, *left]
        assert all(after == (before - 1 if before else CONTEXT // 2 - 1) for before, after in itertools.pairwise(steps))


def test_a_text_ends_where_the_context_is_full_unless_it_is_shifted() -> None:
    decoder = fake_decoder(CONTEXT)
    stream = decoder.stream(PROMPT, max_new_tokens=200, num_draft_tokens=3)
    assert [token.id for token in stream] == continuation(PROMPT, CONTEXT - len(PROMPT))
    assert (stream.stats.finish_reason, stream.tokens_left, stream.dropped_messages) == ("max_seq_len", 0, 0)
    exact = decoder.stream(PROMPT, max_new_tokens=CONTEXT - len(PROMPT), when_full="shift")
    assert len([*exact]) == CONTEXT - len(PROMPT)
    assert (exact.stats.finish_reason, exact.stats.dropped_tokens) == ("length", 0)
    with pytest.raises(InputError, match="when_full is 'slide', expected stop or shift"):
        decoder.stream(PROMPT, when_full="slide")


@pytest.mark.parametrize("chunk", range(5))
def test_a_shift_can_be_cancelled_and_the_conversation_goes_on(chunk: int) -> None:
    decoder = fake_decoder(CONTEXT)
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 3 + chunk:  # the prompt takes two
            stream.cancel()

    stream = decoder.stream(PROMPT, max_new_tokens=200, num_draft_tokens=2, when_full="shift", progress=progress)
    tokens = [token.id for token in stream]
    assert calls[:3] == [(0, len(PROMPT)), (len(PROMPT), len(PROMPT)), (1, CONTEXT // 2)]
    assert stream.stats.finish_reason == "cancelled"
    # It ends with its next token, which is of the round that filled the context.
    assert tokens == continuation(PROMPT, len(tokens))
    assert 0 <= stream.tokens_left < 3
    after = decoder.stream([*PROMPT, *tokens[:20]], max_new_tokens=5)
    assert [token.id for token in after] == continuation([*PROMPT, *tokens[:20]], 5)


def test_sampled_and_ruled_texts_are_shifted_alike_with_and_without_drafts() -> None:

    def decoder() -> Decoder:
        engine: Any = HashedEngine(97)
        engine.manifest.max_seq_len = CONTEXT
        engine.manifest.limits["num_tokens"], engine.manifest.sampling = 8, Sampling()
        engine.manifest.repetition_penalty = 1.0
        return Decoder(Path("b"), engine, None, DraftLength(8, Costs(8)))

    texts = []
    for drafts in (0, 4, None):
        stream = decoder().stream(
            PROMPT,
            **{"max_new_tokens": 300, "num_draft_tokens": drafts, "when_full": "shift"},
            **{"temperature": 1.0, "top_k": 64, "seed": 3, "frequency_penalty": 0.5},
        )
        texts.append([token.id for token in stream])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 300


def test_positions_count_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    pick = Sampling.pick

    def watched(self: Sampling, logits: np.ndarray, ids: np.ndarray, state: np.ndarray, position: int) -> Any:
        seen.append(position)
        return pick(self, logits, ids, state, position)

    monkeypatch.setattr(Sampling, "pick", watched)
    stream = fake_decoder(CONTEXT).stream(PROMPT, max_new_tokens=200, num_draft_tokens=0, when_full="shift")
    assert len([*stream]) == 200
    assert seen == [*range(len(PROMPT), len(PROMPT) + 200)]


def test_the_vectors_are_those_of_their_script() -> None:
    assert make_full_context.FILE.read_text() == make_full_context.text()
    chats = VECTORS["chats"]
    assert sum(chat["dropped_messages"][0] > 0 for chat in chats) > 20
    assert sum(len(chat["shifts"]) > 0 for chat in chats) > 20


@pytest.mark.parametrize(
    "case", VECTORS["chats"], ids=lambda case: f"{len(case['messages'])} messages in {case['max_seq_len']}"
)
def test_what_stays_of_a_chat(case: dict[str, Any]) -> None:
    shift = ChatShift(case["messages"], make_full_context.encoded, case["max_seq_len"])
    assert shift.begin(lambda prompt: common_prefix(case["cache"], prompt[:-1])) == case["prompt"]
    dropped = [shift.dropped_messages]
    for count, length in case["shifts"]:
        stays = shift.shift([7] * count)
        assert stays is not None and len(stays) == length and stays[len(stays) - count :] == [7] * count
        dropped.append(shift.dropped_messages)
    assert dropped == case["dropped_messages"]
    if len(case["prompt"]) < case["max_seq_len"]:
        assert shift.shift([7] * case["last_answer"]) is None


def chat(*lengths: int, system: int = 0) -> list[Any]:
    """Turns of a user's message and an answer, each of so many tokens; the last is the user's alone."""
    start = [{"role": "system", "content": f"90 {system}"}] if system else []
    roles = itertools.cycle(["user", "assistant"])
    return [*start, *({"role": next(roles), "content": f"{10 + i} {n}"} for i, n in enumerate(lengths))]


def nothing(tokens: Sequence[int]) -> int:
    del tokens
    return 0


@pytest.mark.parametrize(
    ("messages", "dropped"),
    [
        (chat(10, 10, 10), 0),
        (chat(20, 20, 21), 0),  # 63 tokens: one is left for the answer
        (chat(20, 20, 22), 2),
        (chat(20, 2, 20, 2, 20), 4),
        (chat(20, 2, 5, 5, 5, 5, 30), 6),  # the newest turn has more than half of the context, and stays
        (chat(40, 5, 2, 5, 3, system=12), 2),
        (chat(5, 80, 2, 5, 3, 4, 3, system=12), 2),
    ],
)
def test_a_chat_that_does_not_fit_begins_later(messages: list[Any], dropped: int) -> None:
    shift = ChatShift(messages, make_full_context.encoded, CONTEXT)
    prompt = shift.begin(nothing)
    system = messages[0]["role"] == "system"
    assert shift.dropped_messages == dropped
    assert prompt == make_full_context.encoded([*messages[:system], *messages[system + dropped :]])


def test_what_was_left_out_stays_left_out() -> None:
    """Turn after turn, the cache is used: a new cut comes when the context is full again, not before."""
    lengths, cache, cuts = [9], list[int](), list[int]()
    for _ in range(60):
        shift = ChatShift(chat(*lengths, system=6), make_full_context.encoded, CONTEXT)
        prompt = shift.begin(lambda tokens: common_prefix(cache, tokens))
        cuts.append(shift.dropped_messages)
        run = len(prompt) - common_prefix(cache, prompt)
        assert run <= (12 if cuts[-1:] == cuts[-2:-1] else CONTEXT)
        cache[:] = [*prompt, *[10 + len(lengths)] * 3][:CONTEXT]
        lengths += [3, 5]
    assert cuts == sorted(cuts)
    # A turn has 8 tokens, and a cut frees half of the context.
    assert len(set(cuts)) <= 60 * 8 // (CONTEXT // 4)


def test_a_template_that_refuses_the_rest_ends_the_text() -> None:
    def refusing(messages: Sequence[Any]) -> list[int]:
        if len(messages) < 3:
            raise InputError("no")
        return make_full_context.encoded(messages)

    shift = ChatShift(chat(20, 20, 10), refusing, CONTEXT)
    assert len(shift.begin(nothing)) == 52
    assert shift.shift([1] * 12) is None
    assert shift.dropped_messages == 0


def test_an_answer_that_fills_the_context_alone_ends() -> None:
    shift = ChatShift(chat(10, 10, 10), make_full_context.encoded, CONTEXT)
    shift.begin(nothing)
    stays = shift.shift([7] * 32)
    assert stays == [*make_full_context.encoded(chat(10, 10, 10)[2:]), *[7] * 32]
    assert shift.dropped_messages == 2
    assert shift.shift([7] * 52) is None  # only the newest turn is left


def answered(decoder: Decoder, turns: int, drafts: int | None, **options: Any) -> tuple[list[Stream], list[Any]]:
    messages: list[Any] = []
    streams = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Return the number {turn} of the list."})
        stream = decoder.chat(messages, max_new_tokens=90, num_draft_tokens=drafts, when_full="shift", **options)
        for _ in stream:
            assert stream.tokens_left >= 0
        streams.append(stream)
        messages.append(stream.message)
    return streams, messages


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chat_goes_on_for_ever(chat_bundle: Path, temperature: float) -> None:
    """A real bundle: drafted and plain give the same chat, through shifts between and within answers."""
    chats = []
    for drafts in (0, 3, None):
        with open_decoder(chat_bundle, threads=1) as decoder:
            streams, _ = answered(decoder, 9, drafts, temperature=temperature)
            chats.append([(stream.tokens, stream.dropped_messages, stream.stats.dropped_tokens) for stream in streams])
    assert chats[0] == chats[1] == chats[2]
    assert chats[0][-1][1] > 2
    assert any(dropped for _, _, dropped in chats[0]) or temperature  # sampled answers are short


def test_a_shifted_answer_is_that_of_its_prompt_alone(chat_bundle: Path) -> None:
    with open_decoder(chat_bundle, threads=1) as decoder:
        streams, messages = answered(decoder, 9, 0)
        last = streams[-1]
        kept = messages[last.dropped_messages : -1]
        assert decoder.template is not None and decoder.tokenizer is not None
        prompt = decoder.tokenizer.encode(decoder.template.render(kept))
        before = last.tokens[: decoder.engine.manifest.max_seq_len - len(last.prompt)]
        if last.stats.dropped_tokens:
            prompt = [*prompt, *before]
            expected = last.tokens[len(before) :]
        else:
            expected = last.tokens
        decoder.forget()
        alone = decoder.stream(prompt, max_new_tokens=len(expected), num_draft_tokens=0)
        assert [token.id for token in alone] == expected
