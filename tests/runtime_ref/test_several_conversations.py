"""Several conversations with one decoder: each as if it were alone, one pass at a time, until the decoder is closed."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_ref.conversation import Conversation
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import Decoder, open_decoder
from runtime_ref.token_stream import Stream
from runtime_ref.turns import Turns
from tests.runtime_ref.fake_graphs import MAX_DRAFTS, VOCAB, continuation, fake_decoder, fake_engine
from tests.runtime_ref.hashed import HashedEngine

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 64}


def hashed_decoder() -> Decoder:
    engine = HashedEngine(97)
    engine.manifest.limits["num_tokens"] = 4  # type: ignore[index]
    engine.manifest.sampling, engine.manifest.repetition_penalty = Sampling(), 1.0  # type: ignore[misc]
    return Decoder(Path("b"), engine, None, DraftLength(8, Costs(8)))


@pytest.mark.parametrize("seed", range(12))
def test_interleaved_token_by_token(seed: int) -> None:
    """Prompts with beginnings in common, texts left early, sampled and penalised: the tokens of each alone."""
    random, decoder = np.random.default_rng(seed), hashed_decoder()
    conversations = [decoder, *(decoder.conversation() for _ in range(3))]
    running: dict[int, tuple[Stream, list[int]]] = {}
    compared = 0
    for _ in range(400):
        which = int(random.integers(len(conversations)))
        if which not in running or random.random() < 0.02:
            prompt = [2, *random.integers(3, 9, random.integers(1, 20)).tolist()]
            options = {**SAMPLED, "seed": seed, "presence_penalty": 0.5, "max_new_tokens": int(random.integers(1, 30))}
            drafts = [None, 0, 3][random.integers(3)]
            alone = [*hashed_decoder().stream(prompt, **options)]
            stream = conversations[which].stream(prompt, num_draft_tokens=drafts, **options)
            running[which] = stream, [token.id for token in alone]
        stream, expected = running[which]
        token = next(stream, None)
        if token is None:
            assert stream.tokens == expected
            del running[which]
            compared += 1
        else:
            assert stream.tokens == expected[: len(stream.tokens)]
    assert compared > 5


@pytest.mark.parametrize("seed", range(6))
def test_every_row_and_state_is_the_conversations_own(seed: int) -> None:
    """The fake graphs check rows and states; caches grow and move while others have their turns."""
    random, decoder = np.random.default_rng(seed), fake_decoder()
    texts: list[tuple[Conversation, list[int]]] = [(decoder.conversation(), []) for _ in range(4)]
    for _ in range(25):
        streams = {}
        for i in random.permutation(4)[: random.integers(1, 5)].tolist():
            conversation, text = texts[i]
            prompt = [*text, *random.integers(0, VOCAB, random.integers(1, 30)).tolist()]
            if len(prompt) > 900:
                continue
            drafts = [None, 0, 3, 7][random.integers(4)]
            streams[i] = conversation.stream(prompt, max_new_tokens=20, num_draft_tokens=drafts)
            texts[i] = conversation, [*prompt, *continuation(prompt, 20)]
        while streams:
            i = random.choice(list(streams))
            if next(streams[i], None) is None:
                stream = streams.pop(i)
                assert [*stream.prompt, *stream.tokens] == texts[i][1]
                assert texts[i][0].position == len(texts[i][1]) - 1
    assert max(conversation.cache.window_start for conversation, _ in texts) > 0


def test_from_threads() -> None:
    """Passes come one at a time; a progress function lets others have their turns between chunks."""
    decoder, at_work, most, results = hashed_decoder(), [0], [0], {}
    engine: Any = decoder.engine
    real, barrier = engine.run_target, threading.Barrier(4)

    def run_target(*arguments: Any) -> Any:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        result = real(*arguments)
        at_work[0] -= 1
        return result

    def write(which: int) -> None:
        conversation, tokens = decoder.conversation(), []
        barrier.wait()
        for turn in range(5):
            stream = conversation.stream([2, *range(5, 25), which, turn], max_new_tokens=15, seed=which, **SAMPLED)
            tokens.append([token.id for token in stream])
        results[which] = tokens

    engine.run_target = run_target
    threads = [threading.Thread(target=write, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, tokens in results.items():
        for turn, text in enumerate(tokens):
            alone = hashed_decoder().stream([2, *range(5, 25), which, turn], max_new_tokens=15, seed=which, **SAMPLED)
            assert text == [token.id for token in alone]
    assert (sorted(results), most[0]) == ([0, 1, 2, 3], 1)


def test_others_have_turns_between_chunks_of_a_prompt() -> None:
    decoder = fake_decoder()
    long, short, seen = decoder.conversation(), decoder.conversation(), []
    prompt = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()

    def progress(done: int, total: int) -> None:
        text = [token.id for token in short.stream([done % VOCAB, 3], max_new_tokens=3, num_draft_tokens=2)]
        seen.append((done, total, text))

    tokens = [token.id for token in long.stream(prompt, max_new_tokens=9, num_draft_tokens=3, progress=progress)]
    assert tokens == continuation(prompt, 9)
    assert seen == [(done, 40, continuation([done % VOCAB, 3], 3)) for done in range(0, 41, 8)]


def test_a_text_that_another_has_replaced_ends_between_chunks() -> None:
    decoder = fake_decoder()

    def progress(done: int, total: int) -> None:
        if done == 16:
            assert [token.id for token in decoder.stream([1, 2], max_new_tokens=4)] == continuation([1, 2], 4)

    replaced = decoder.stream([3] * 40, progress=progress)
    with pytest.raises(RuntimeError, match="another text was started in this conversation"):
        next(replaced)
    assert decoder.engine.cache.tokens == [1, 2, *continuation([1, 2], 3)]
    assert [token.id for token in decoder.stream([3] * 40, max_new_tokens=4)] == continuation([3] * 40, 4)


def test_sizes() -> None:
    decoder = fake_decoder(700)
    conversation, other = decoder.conversation(), decoder.conversation()
    assert (conversation.position, conversation.tokens_left, conversation.num_bytes) == (0, 700, 0)
    list(conversation.stream([1] * 290, max_new_tokens=11))
    rows = sum(buffer.shape[1] for buffer in conversation.cache.buffers.values())
    assert (conversation.position, conversation.tokens_left, conversation.num_bytes) == (300, 400, 4 * rows)
    assert rows >= 300 + 256
    assert (other.position, other.num_bytes, decoder.engine.manifest.max_seq_len) == (0, 0, 700)


def test_memory_of_a_conversation_is_freed_with_it() -> None:
    decoder = fake_decoder()
    conversation = decoder.conversation()
    list(conversation.stream([1, 2, 3], max_new_tokens=3))
    buffer = weakref.ref(conversation.cache.buffers["full"])
    del conversation
    list(decoder.stream([1], max_new_tokens=3))  # the graphs are bound to another cache now
    gc.collect()
    assert buffer() is None


class Blocked:
    """A target that waits in its pass until it is let go on."""

    def __init__(self, target: Any) -> None:
        self.target, self.entered, self.let_go, self.freed_meanwhile = target, threading.Event(), threading.Event(), []
        self.bind = target.bind

    def run(self, **inputs: np.ndarray) -> Any:
        self.entered.set()
        assert self.let_go.wait(60)
        return self.target.run(**inputs)


def blocked_decoder() -> tuple[Decoder, Blocked]:
    engine: Any = fake_engine(700)
    target = Blocked(engine.graphs["target"])
    engine.graphs = {**engine.graphs, "target": target}
    return Decoder(Path("b"), engine, None, DraftLength(MAX_DRAFTS, Costs(MAX_DRAFTS))), target


def test_close_waits_for_the_pass_that_runs() -> None:
    decoder, target = blocked_decoder()
    stream, errors, engine = decoder.stream([1, 2, 3] * 9), [], decoder.engine
    freed, really_close = [], engine.close

    def close_engine() -> None:
        freed.append(target.let_go.is_set())
        really_close()

    def write() -> None:
        try:
            list(stream)
        except RuntimeError as error:
            errors.append(str(error))

    engine.close = close_engine  # type: ignore[method-assign]
    writer, closer = threading.Thread(target=write), threading.Thread(target=decoder.close)
    writer.start()
    assert target.entered.wait(60)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive() and not freed
    target.let_go.set()
    writer.join(60)
    closer.join(60)
    assert not writer.is_alive() and not closer.is_alive()
    assert freed == [True]
    assert errors == ["the decoder is closed; open the bundle again"]


def test_nothing_goes_on_after_close() -> None:
    decoder = fake_decoder()
    other = decoder.conversation()
    begun, fresh = other.stream([1, 2, 3], max_new_tokens=30, num_draft_tokens=4), decoder.stream([1, 2, 3])
    next(begun)
    target = weakref.ref(decoder.engine.graphs["target"])  # type: ignore[attr-defined]
    decoder.close()
    decoder.close()
    for call in (
        lambda: next(begun),
        lambda: next(fresh),
        lambda: decoder.stream([1]),
        lambda: other.stream([1]),
        decoder.conversation,
    ):
        with pytest.raises(RuntimeError, match=r"^the decoder is closed; open the bundle again$"):
            call()
    assert begun.tokens == continuation([1, 2, 3], 1)
    gc.collect()
    assert target() is None


@pytest.mark.parametrize("when", ["between chunks", "in a pass"])
def test_closed_by_the_thread_that_runs(when: str) -> None:
    """From a progress function, or from a signal handler in the middle of a pass: it frees after the pass."""
    decoder = fake_decoder()
    engine: Any = decoder.engine
    if when == "in a pass":
        real = engine.run_target

        def run_target(*arguments: Any) -> Any:
            with pytest.raises(RuntimeError, match="a pass is running in this thread"):
                next(other)
            decoder.close()
            return real(*arguments)  # the graphs are still there

        engine.run_target = run_target
    other = decoder.conversation().stream([5])
    stream = decoder.stream([1] * 20, progress=lambda *_: decoder.close() if when == "between chunks" else None)
    with pytest.raises(RuntimeError, match="the decoder is closed"):
        next(stream)
    assert engine.graphs == {}


def test_ctrl_c_while_waiting_for_a_turn_leaves_it_to_others() -> None:
    """Between two chunks, when another thread has the turn; the wait is interrupted as a signal handler does it."""
    turns = Turns(lambda: None)
    real = turns._lock

    class Interrupted:
        """Its first wait after a pause ends in KeyboardInterrupt."""

        left = 0

        def acquire(self) -> bool:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return real.acquire()

        def release(self) -> None:
            real.release()

        def __enter__(self) -> bool:
            return self.acquire()

        def __exit__(self, *_: object) -> None:
            real.release()

    lock: Any = Interrupted()
    turns._lock = lock
    with pytest.raises(KeyboardInterrupt), turns.turn():
        lock.left = 1
        with turns.pause():
            pass
    taken = []
    thread = threading.Thread(target=lambda: taken.append(real.acquire(timeout=10)))
    thread.start()
    thread.join()
    assert taken == [True]


def test_a_closed_bundle_is_no_longer_in_memory(bundle: Callable[[str], Path]) -> None:
    """Four conversations in turn with a real bundle, past the sliding window: the tokens of each alone."""
    with open_decoder(bundle("demo"), threads=1) as alone:
        prompts = [np.random.default_rng(i).integers(3, 2000, 50 + 130 * i).tolist() for i in range(4)]
        expected = []
        for prompt in prompts:
            alone.forget()
            expected.append([token.id for token in alone.stream(prompt, max_new_tokens=14, num_draft_tokens=3)])
    with pytest.raises(RuntimeError, match="closed"):
        alone.stream("a")
    with open_decoder(bundle("demo"), threads=1) as decoder:
        conversations = [decoder.conversation() for _ in prompts]
        streams = [
            conversation.stream(prompt, max_new_tokens=14, num_draft_tokens=3)
            for conversation, prompt in zip(conversations, prompts, strict=True)
        ]
        for _ in range(14):
            for stream in streams:
                next(stream, None)
        assert [stream.tokens for stream in streams] == expected
        session = weakref.ref(decoder.engine.graphs["target"])  # type: ignore[attr-defined]
    assert session() is None
