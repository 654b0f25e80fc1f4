"""The decoding loop: prefill, then rounds, as a generator of tokens."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runtime_ref.engine import Engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import Manifest
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats


@dataclass(frozen=True)
class Options:
    """`num_draft_tokens` 0 is plain decoding."""

    max_new_tokens: int = 128
    num_draft_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)


def generate(engine: Engine, prompt: Sequence[int], options: Options, stats: Stats) -> Iterator[int]:
    """Yield new tokens as they are decided, and count what happened in `stats`.

    Speculative and plain decoding yield the same tokens; they stop at the first end token, after `max_new_tokens`, or
    when prompt and answer together fill the context.

    Raises:
        InputError: the prompt is empty, has ids outside the vocabulary, or leaves no room for an answer.
    """
    check_prompt(engine.manifest, prompt)
    room = engine.manifest.max_seq_len - len(prompt)
    budget, out_of_budget = min((options.max_new_tokens, "length"), (room, "max_seq_len"))
    started = time.perf_counter()
    last = engine.prefill(prompt, options.sampling)
    stats.prefill_seconds = time.perf_counter() - started
    stats.finish_reason = out_of_budget
    tokens, produced = [last], 0
    while True:
        for token in tokens:
            yield token
            produced += 1
            if token in engine.manifest.eos:
                stats.finish_reason = "eos"
                return
        if produced == budget:
            return
        started = time.perf_counter()
        # The bonus token needs a place in the budget as well.
        done = engine.round(tokens[-1], min(options.num_draft_tokens, budget - produced - 1), options.sampling)
        stats.decode_seconds += time.perf_counter() - started
        tokens = done.tokens
        ends = [i + 1 for i, token in enumerate(tokens) if token in engine.manifest.eos]
        stats.add(done, min(ends, default=len(tokens)))


def check_prompt(manifest: Manifest, prompt: Sequence[int]) -> None:
    """Refuse a prompt that cannot be run.

    Raises:
        InputError: empty, too long for the context, or with an id that is not in the vocabulary.
    """
    if not prompt:
        raise InputError("the prompt is empty: expected at least one token")
    if len(prompt) >= manifest.max_seq_len:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, the bundle's context has {manifest.max_seq_len} for prompt and"
            " answer together; shorten it, or export with a larger --max-seq-len"
        )
    for token in prompt:
        if not 0 <= token < manifest.vocab_size:
            raise InputError(f"the prompt has token id {token}, expected 0 to {manifest.vocab_size - 1}")
