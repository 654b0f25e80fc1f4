"""The decoding loop: prefill, then rounds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from runtime_ref.acceptance import Round
from runtime_ref.draft_length import DraftLength
from runtime_ref.drafts import FixedDrafts, PlannedDrafts
from runtime_ref.engine import Engine
from runtime_ref.errors import InputError
from runtime_ref.full_context import Shift
from runtime_ref.grammar import Grammar
from runtime_ref.manifest import Manifest
from runtime_ref.rules import RuledChooser, Rules, check_parts, check_rules, text_chooser
from runtime_ref.sampling import Chooser, Displaced, Sampling
from runtime_ref.stats import Stats


@dataclass(frozen=True)
class Options:
    """How one text is generated.

    Attributes:
        max_new_tokens: the largest number of tokens to generate, at least 1.
        num_draft_tokens: K of every round; 0 is plain decoding, None lets a `DraftLength` plan each round.
        sampling: how tokens are chosen.
        rules: what changes logits before that.
        grammars: what parts of the text must match: the `answer`, or each `tool_call`.
        opens: names of channels that may come before an answer that must match.
        thinking_budget: the largest number of tokens of thoughts, after which a thought is ended; None for any.
    """

    max_new_tokens: int = 128
    num_draft_tokens: int | None = 0
    sampling: Sampling = field(default_factory=Sampling)
    rules: Rules = field(default_factory=Rules)
    grammars: Mapping[str, Grammar] = field(default_factory=dict)
    opens: frozenset[str] = frozenset()
    thinking_budget: int | None = None


def generate(
    engine: Engine, prompt: Sequence[int], options: Options, stats: Stats, planner: DraftLength | None = None
) -> Iterator[int]:
    """Yield new token ids as they are decided.

    Speculative and plain decoding yield the same tokens. They stop at the first end token, after `max_new_tokens`, or
    when prompt and answer together fill the context.

    Args:
        engine: a loaded bundle.
        prompt: token ids, the first of them the beginning-of-text token.
        options: budget, drafting, sampling and rules.
        stats: counts of this text, which are added to.
        planner: plans the rounds if `options.num_draft_tokens` is None; keep it from text to text, so that it learns.

    Raises:
        InputError: as `check_prompt` and `check_options`, or the rules leave no token to choose.
        ValueError: rounds are to be planned, and there is no planner.
    """
    for done in rounds(engine, prompt, options, stats, planner):
        yield from done.tokens


def rounds(
    engine: Engine,
    prompt: Sequence[int],
    options: Options,
    stats: Stats,
    planner: DraftLength | None = None,
    start: int = 0,
    go_on: Callable[[int], bool] = lambda _: True,
    shift: Shift = lambda _: None,
) -> Iterator[Round]:
    """Yield the rounds of `generate`, the prefill first; `stats.finish_reason` is set before the last one is yielded.

    Nothing is yielded if the prefill is stopped. Where the context is full and `shift` says what stays, that is run
    before the round that filled it is yielded: a text that is stopped meanwhile ends with that round.

    Args:
        engine: a loaded bundle.
        prompt: token ids, the first of them the beginning-of-text token.
        options: budget, drafting, sampling and rules.
        stats: counts of this text, which are added to.
        planner: plans the rounds if `options.num_draft_tokens` is None.
        start: how many tokens of the prompt are in the engine's cache already.
        go_on: called in each prefill, as by `Engine.prefill`; False stops it, and the text is `cancelled`.
        shift: called when the context is full with the new tokens so far; returns the tokens that go on in place of
            prompt and answer, or None to end the text.

    Raises:
        InputError: as `check_prompt` and `check_options`, or the rules leave no token to choose.
        ValueError: rounds are to be planned, and there is no planner.
    """
    manifest = engine.manifest
    check_prompt(manifest, prompt)
    check_options(manifest, options)
    of_parts = (options.grammars, options.opens, options.thinking_budget)
    rules = text_chooser(engine, prompt, options.sampling, options.rules, *of_parts)
    of_text: Chooser = options.sampling if rules is None else rules
    chooser = of_text
    drafts = _drafts(engine, options, prompt, planner, rules)
    stats.begin(start)
    started = time.perf_counter()
    done, source = engine.prefill(prompt, chooser, start, go_on), None
    stats.prefill_seconds = time.perf_counter() - started
    if not done.tokens:
        stats.finish_reason = "cancelled"
        return
    left, room, answer = options.max_new_tokens, manifest.max_seq_len - len(prompt), list[int]()
    while True:
        ends = [i + 1 for i, token in enumerate(done.tokens) if token in manifest.eos]
        kept = done.cut(min(ends, default=len(done.tokens)))
        left, room = left - len(kept.tokens), room - len(kept.tokens)
        answer += kept.tokens
        if source is not None:
            stats.add(kept, source)
        stays = shift(answer) if not room and left and not ends else None
        if stays is not None:
            room = manifest.max_seq_len - len(stays)
            dropped = len(prompt) + len(answer) - len(stays)
            chooser, started = Displaced(of_text, dropped), time.perf_counter()
            done = engine.prefill(stays, chooser, engine.cache.reusable(stays), go_on)
            stats.prefill_seconds += time.perf_counter() - started
        if ends or not (left and room):
            stats.finish_reason = "eos" if ends else "max_seq_len" if left else "length"
        elif not done.tokens:
            stats.finish_reason = "cancelled"
        yield kept
        if stats.finish_reason:
            return
        if stays is not None:
            stats.shift(dropped)
            source = None
            continue
        started = time.perf_counter()
        # The bonus token takes one token of the budget as well.
        proposed = drafts.make(done.tokens[-1], min(manifest.max_draft_tokens, left - 1, room - 1))
        drafted = time.perf_counter()
        done, source = engine.verify(done.tokens[-1], proposed, chooser), drafts.source
        ended = time.perf_counter()
        drafts.learn(done, drafted - started, ended - drafted)
        stats.decode_seconds += ended - started


def _drafts(
    engine: Engine,
    options: Options,
    prompt: Sequence[int],
    planner: DraftLength | None,
    rules: RuledChooser | None,
) -> FixedDrafts | PlannedDrafts:
    if options.num_draft_tokens is not None:
        return FixedDrafts(engine, options.num_draft_tokens, rules)
    if planner is None:
        raise ValueError("num_draft_tokens is None: rounds must be planned, but there is no DraftLength")
    return PlannedDrafts(engine, planner, prompt, rules)


def check_options(manifest: Manifest, options: Options) -> None:
    """Refuse options that a bundle cannot serve.

    Args:
        manifest: the bundle's.
        options: what the caller asks for.

    Raises:
        InputError: K is negative or beyond what the bundle was exported for, no new token is asked for, or a rule names
            a token or a part that the bundle does not have.
    """
    drafts, max_drafts = options.num_draft_tokens, manifest.max_draft_tokens
    if drafts is not None and not 0 <= drafts <= max_drafts:
        raise InputError(
            f"{drafts} draft tokens a round were asked for, the bundle was exported for up to {max_drafts}"
        )
    if options.max_new_tokens < 1:
        raise InputError(f"{options.max_new_tokens} new tokens were asked for, expected at least 1")
    check_rules(manifest, options.rules)
    check_parts(manifest, options.grammars, options.opens, options.thinking_budget)


def check_prompts(manifest: Manifest, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts of which one cannot be run, before any is; of several, the message says which.

    Args:
        manifest: the bundle's.
        prompts: token ids of each.

    Raises:
        InputError: as `check_prompt`.
    """
    for number, prompt in enumerate(prompts, start=1):
        try:
            check_prompt(manifest, prompt)
        except InputError as error:
            raise InputError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error


def check_prompt(manifest: Manifest, prompt: Sequence[int]) -> None:
    """Refuse a prompt that cannot be run.

    Args:
        manifest: the bundle's.
        prompt: token ids.

    Raises:
        InputError: the prompt is empty, leaves no room for an answer, or has an id that is not in the vocabulary.
    """
    if not prompt:
        raise InputError("the prompt is empty: expected at least one token")
    if len(prompt) >= manifest.max_seq_len:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, the bundle's context has {manifest.max_seq_len} for prompt and"
            " answer together; shorten it, leave out the oldest turns of a chat with --when-full shift, or export with"
            " a larger --max-seq-len"
        )
    for token in prompt:
        if not 0 <= token < manifest.vocab_size:
            raise InputError(f"the prompt has token id {token}, expected 0 to {manifest.vocab_size - 1}")
