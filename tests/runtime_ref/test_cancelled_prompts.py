"""Prompts whose run is watched, cancelled or interrupted: no pass follows, and what was run stays usable."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import Decoder, open_decoder
from runtime_ref.token_stream import Stream
from tests.runtime_ref.hashed import HashedEngine

VOCAB, CHUNK = 97, 4
SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "generate-1.schema.json"


class Watched(HashedEngine):
    """Counts its passes, and Ctrl-C comes in the pass before which `left` is 1."""

    passes = 0
    left = 0

    def run_target(self, tokens: Any, rows: Any) -> list[np.ndarray]:
        self.passes += 1
        outputs = super().run_target(tokens, rows)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return outputs


def hashed_decoder() -> Decoder:
    engine = Watched(VOCAB)
    engine.manifest.limits["num_tokens"] = CHUNK  # type: ignore[index]
    engine.manifest.sampling, engine.manifest.repetition_penalty = Sampling(), 1.0  # type: ignore[misc]
    return Decoder(Path("b"), engine, None, DraftLength(8, Costs(8)))


def written(decoder: Decoder, prompt: list[int], seed: int) -> Stream:
    stream = decoder.stream(prompt, max_new_tokens=6, num_draft_tokens=3, temperature=1.0, top_k=64, seed=seed)
    assert len([*stream]) == 6
    return stream


@pytest.mark.parametrize("seed", range(40))
def test_random_cancels_lose_nothing(seed: int) -> None:
    """Texts that share beginnings, cancelled or interrupted at any chunk, or not: the same tokens as alone."""
    random, decoder, text = np.random.default_rng(seed), hashed_decoder(), [2]
    engine: Any = decoder.engine
    for _ in range(30):
        prompt = [
            *text[: random.integers(1, len(text) + 1)],
            *random.integers(3, VOCAB, random.integers(1, 25)).tolist(),
        ]
        reused = engine.cache.reusable(prompt)
        chunks = -(-(len(prompt) - reused) // CHUNK)
        before, stops_after = engine.passes, int(random.integers(0, chunks + 1))
        in_cache = min(reused + stops_after * CHUNK, len(prompt))
        seen: list[tuple[int, int]] = []

        def progress(*at: int, seen: list[tuple[int, int]] = seen, stops_after: int = stops_after) -> None:
            seen.append(at)
            if len(seen) == stops_after + 1:
                decoder.current.cancel()  # type: ignore[union-attr]

        way = random.choice(["cancelled", "interrupted", "whole"])
        if way == "cancelled":
            stream = decoder.stream(prompt, max_new_tokens=6, progress=progress)
            assert [*stream] == [*stream] == stream.tokens == []
            assert (stream.stats.finish_reason, engine.passes - before) == ("cancelled", stops_after)
            assert seen == [(min(reused + i * CHUNK, len(prompt)), len(prompt)) for i in range(stops_after + 1)]
            text = prompt
        elif way == "interrupted" and stops_after:
            engine.left, in_cache = stops_after, reused + (stops_after - 1) * CHUNK
            with pytest.raises(KeyboardInterrupt):
                next(decoder.stream(prompt, max_new_tokens=6))
            stops_after = stops_after - 1 or 1  # what follows the reused tokens was cut off before the pass
            text = prompt
        else:
            stream = written(decoder, prompt, seed)
            alone = written(hashed_decoder(), prompt, seed)
            assert (stream.tokens, stream.stats.reused_tokens) == (alone.tokens, reused)
            text = [*prompt, *stream.tokens]
            continue
        if stops_after:
            assert engine.cache.tokens == prompt[:in_cache]
        assert engine.cache.reusable(prompt) == min(in_cache, len(prompt) - 1)


def test_a_round_that_is_interrupted_loses_its_own_tokens_only() -> None:
    decoder, prompt = hashed_decoder(), [2, *range(5, 16)]
    alone = written(hashed_decoder(), prompt, 0)
    engine: Any = decoder.engine
    engine.left = 5  # three chunks, two rounds
    stream = decoder.stream(prompt, max_new_tokens=6, num_draft_tokens=3, temperature=1.0, top_k=64)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert len(stream.tokens) >= 2
    assert engine.cache.tokens == [*prompt, *stream.tokens[:-1]]
    assert written(decoder, prompt, 0).tokens == alone.tokens


@pytest.mark.parametrize("after", [0, 1, 3])
def test_forgotten_texts_are_run_again_even_if_their_stream_goes_on(after: int) -> None:
    decoder, prompt = hashed_decoder(), [2, *range(5, 16)]
    alone = written(hashed_decoder(), prompt, 0)
    stream = decoder.stream(prompt, max_new_tokens=6, num_draft_tokens=3, temperature=1.0, top_k=64)
    for _ in range(after):
        next(stream)
    decoder.forget()
    assert [token.id for token in stream] == alone.tokens[after:]
    again = written(decoder, prompt, 0)
    assert again.stats.reused_tokens == (0 if after else len(prompt) - 1)
    assert again.tokens == alone.tokens


def test_what_is_forgotten_stays_forgotten_where_the_next_prompt_is_stopped() -> None:
    decoder, prompt = hashed_decoder(), [2, *range(3, 20)]
    written(decoder, prompt, 0)
    decoder.forget()
    stopped = decoder.stream(prompt)
    stopped.cancel()
    assert [*stopped] == []
    assert written(decoder, prompt, 0).stats.reused_tokens == 0


@pytest.mark.parametrize("way", ["cancelled", "interrupted"])
def test_a_bundle_goes_on_from_the_last_chunk(way: str, bundle: Callable[[str], Path]) -> None:
    """Cancelled from another thread between two chunks, or by Ctrl-C in one; also past the sliding window."""
    decoder, fresh = (open_decoder(bundle("demo"), threads=1) for _ in range(2))
    chunk = decoder.engine.manifest.limits["num_tokens"]
    prompt = np.random.default_rng(0).integers(3, 2000, 3 * chunk + 20).tolist()
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2 * chunk:
            if way == "interrupted":
                raise KeyboardInterrupt
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()

    stream = decoder.stream(prompt, progress=progress)
    if way == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    else:
        assert [*stream] == []
        assert stream.stats.finish_reason == "cancelled"
        printed = {"tokens": [], "text": stream.text, "thought": "", "tool_calls": [], **stream.stats.as_dict()}
        printed |= {"tokens_left": stream.tokens_left, "dropped_messages": stream.dropped_messages}
        jsonschema.validate({"schema_version": 1, **printed}, json.loads(SCHEMA.read_text()))
    assert seen == [(i * chunk, len(prompt)) for i in range(3)]
    assert decoder.engine.cache.tokens == prompt[: 2 * chunk]
    again = decoder.stream(prompt, max_new_tokens=12, num_draft_tokens=3)
    assert [token.id for token in again] == [token.id for token in fresh.stream(prompt, max_new_tokens=12)]
    assert again.stats.reused_tokens == 2 * chunk
