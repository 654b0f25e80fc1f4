"""Speed and acceptance of drafting on texts: every number of drafts per round continues the same prompts, in turns."""

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.bench.timing import turns
from runtime_ref.acceptance import Round
from runtime_ref.costs import DRAFTER, Costs
from runtime_ref.decoder import Options
from runtime_ref.decoder import rounds as decode
from runtime_ref.draft_length import DraftLength
from runtime_ref.engine import Engine
from runtime_ref.errors import InputError
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats

MIN_OPENINGS, MAX_OPENINGS, MAX_OPENING_TOKENS = 4, 16, 12
DRAFT_LENGTHS = (1, 2, 4, 8)  # drafts per round that are measured, besides the bundle's default and its maximum
MIN_TURNS, MAX_TURNS = 3, 9


@dataclass(frozen=True)
class Text:
    """The continuation of a prompt.

    Attributes:
        tokens: token ids; the first is the prefill's.
        drafted: for each token, whether it was an accepted draft.
        rounds: the rounds after the prefill.
        decode_seconds: time of these rounds in seconds.
    """

    tokens: list[int]
    drafted: list[bool]
    rounds: list[Round]
    decode_seconds: float


# Texts by number of drafts per round, None if the runtime chooses it anew each round; a list of texts for each turn.
Runs = dict[int | None, list[list[Text]]]


def generate_text(engine: Engine, prompt: Sequence[int], options: Options, length: DraftLength | None = None) -> Text:
    """Continue a prompt, and keep what each round did.

    Args:
        engine: an engine of the bundle.
        prompt: token ids.
        options: how to continue it.
        length: plans the rounds if the options leave the number of drafts open.

    Raises:
        InputError: the prompt cannot be run.
    """
    stats = Stats()
    first, *later = decode(engine, prompt, options, stats, length)
    tokens, drafted = list(first.tokens), [False]
    for done in later:
        tokens += done.tokens
        drafted += [i < done.accepted for i in range(len(done.tokens))]
    return Text(tokens, drafted, later, stats.decode_seconds)


def openings(engine: Engine, max_new_tokens: int) -> list[list[int]]:
    """Generate prompts: the beginning-of-text token, and what the target continues it with at temperature 1.

    Random token ids would not do: they are no text, and drafts after them are poor. Texts that end early are followed
    by more of them, so that there are enough rounds to count.

    Args:
        engine: an engine of the bundle.
        max_new_tokens: tokens after which the continuation of a prompt ends.

    Returns:
        Token ids of `MIN_OPENINGS` to `MAX_OPENINGS` prompts, without end tokens.

    Raises:
        InputError: the context has no room for them.
    """
    manifest = engine.manifest
    max_tokens, generated = max(1, min(MAX_OPENING_TOKENS, manifest.max_seq_len // 4)), 0
    prompts: list[list[int]] = []
    while len(prompts) < MIN_OPENINGS or (len(prompts) < MAX_OPENINGS and generated < MIN_OPENINGS * max_new_tokens):
        sampling = Sampling(1.0, seed=len(prompts))
        tokens = generate_text(engine, [manifest.bos], Options(max_tokens, 0, sampling)).tokens
        prompts.append([manifest.bos, *(token for token in tokens if token not in manifest.eos)])
        generated += len(generate_text(engine, prompts[-1], Options(max_new_tokens, 0)).tokens)
    return prompts


def draft_lengths(default: int, max_drafts: int) -> list[int]:
    """Return the numbers of drafts per round that are measured, given a bundle's default and maximum."""
    return sorted({k for k in (*DRAFT_LENGTHS, default, max_drafts) if 0 < k <= max_drafts})


def take_turns(
    engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int, drafts: Sequence[int | None], seconds: float
) -> Runs:
    """Continue all prompts with each number of drafts per round, in turns, each turn in another order.

    Args:
        engine: an engine of the bundle.
        prompts: token ids of each prompt.
        max_new_tokens: tokens after which a continuation ends.
        drafts: numbers of drafts per round. With None the runtime plans the rounds; it knows no costs at first, as in
            an app that runs a bundle for the first time.
        seconds: time budget in seconds for each of these numbers; there are at least `MIN_TURNS` turns.
    """
    manifest = engine.manifest
    length = DraftLength(manifest.max_draft_tokens, Costs(manifest.max_draft_tokens, manifest.row_multiple))
    runs: Runs = {k: [] for k in drafts}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in turns(seconds * len(runs), MIN_TURNS, MAX_TURNS):
        shuffle(order)
        for k in order:
            runs[k].append([generate_text(engine, prompt, Options(max_new_tokens, k), length) for prompt in prompts])
    return runs


def check_rounds(texts: Sequence[Text], drafts: int) -> None:
    """Refuse texts without a round to time, or without a draft although rounds have drafts.

    Args:
        texts: continuations with the same number of drafts per round.
        drafts: that number.

    Raises:
        InputError: each text ends too early.
    """
    rounds = [done for text in texts for done in text.rounds]
    if not any(done.drafts or not drafts for done in rounds):
        raise InputError(
            "each text ends before a round with drafts, expected one such round at least; pass other --prompt-ids, or"
            " a larger --max-new-tokens"
        )


def speed(runs: Runs) -> dict[str, Any]:
    """Summarize the speed of decoding, without the prefill.

    Args:
        runs: texts of plain decoding and of each number of drafts per round, with equally many turns each.

    Returns:
        `speed` of the document, without `computed`; `times_faster` is the median over turns of plain decoding's time
        divided by that of the same turn's drafting.
    """
    plain = [_seconds(turn) for turn in runs[0]]
    tokens = [text.tokens for text in runs[0][0]]
    fixed = sorted(k for k in runs if k is not None)
    return {
        "measured": [{"num_draft_tokens": k, **_rates(runs[k], plain)} for k in fixed],
        "auto": {**_rates(runs[None], plain), **planned_rounds(runs[None][-1])} if None in runs else None,
        "same_tokens": all([text.tokens for text in turn] == tokens for texts in runs.values() for turn in texts),
        "turns": len(plain),
    }


def planned_rounds(texts: Sequence[Text]) -> dict[str, Any]:
    """Count rounds by the number of drafts that the runtime chose, from the drafter or by prompt lookup.

    Args:
        texts: continuations of which the runtime planned the rounds.

    Returns:
        `rounds`, how many there were, and `chosen`, how many of them had each number of drafts.
    """
    counts = Counter(len(done.drafts) for text in texts for done in text.rounds)
    return {
        "rounds": sum(counts.values()),
        "chosen": [{"num_draft_tokens": k, "rounds": n} for k, n in sorted(counts.items())],
    }


def _rates(runs: Sequence[Sequence[Text]], plain: Sequence[float]) -> dict[str, Any]:
    times = [_seconds(turn) for turn in runs]
    rates = [_decoded(turn) / seconds for turn, seconds in zip(runs, times, strict=True)]
    rounds = [done for text in runs[-1] for done in text.rounds]
    return {
        "tokens_per_second": {
            "median": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "count": len(rates),
        },
        "times_faster": statistics.median(a / b for a, b in zip(plain, times, strict=True)),
        "tokens_per_round": sum(len(done.tokens) for done in rounds) / len(rounds),
    }


def _seconds(texts: Sequence[Text]) -> float:
    return sum(text.decode_seconds for text in texts)


def _decoded(texts: Sequence[Text]) -> int:
    return sum(len(text.tokens) - 1 for text in texts)


def acceptance(texts: Sequence[Text]) -> dict[str, Any]:
    """Count accepted drafts, in all and by position in the round.

    Args:
        texts: continuations with the same number of drafts per round.

    Returns:
        `acceptance` of the document. `by_position` has as many rows as the longest round had drafts, fewer than asked
        for if all texts are short. `reached` counts the drafts whose earlier drafts were all accepted.
        `accepted_share` is the acceptance rate of all drafts at the position, `conditional` that of the reached ones;
        None if there were none.
    """
    rounds = [done for text in texts for done in text.rounds]
    stats = Stats()
    for done in rounds:
        stats.add(done, DRAFTER)
    positions = []
    for i, (proposed, accepted) in enumerate(zip(stats.drafted_by_position, stats.accepted_by_position, strict=True)):
        reached = sum(len(done.drafts) > i and done.accepted >= i for done in rounds)
        positions.append(
            {
                "position": i + 1,
                "drafted": proposed,
                "reached": reached,
                "accepted": accepted,
                "accepted_share": accepted / proposed,
                "conditional": accepted / reached if reached else None,
            }
        )
    return {
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "rate": stats.acceptance_rate,
        "by_position": positions,
    }


def tokens_per_round(texts: Sequence[Text], drafts: int) -> dict[str, Any]:
    """Count rounds by the number of tokens that they added.

    Args:
        texts: continuations with the same number of drafts per round.
        drafts: that number, K.

    Returns:
        `rounds`, how many there were; the `mean` of their tokens; and their `distribution` over 1 to K + 1 tokens.
    """
    counts = Counter(len(done.tokens) for text in texts for done in text.rounds)
    rounds = sum(counts.values())
    return {
        "rounds": rounds,
        "mean": sum(tokens * count for tokens, count in counts.items()) / rounds,
        "distribution": [{"tokens": tokens, "rounds": counts[tokens]} for tokens in range(1, drafts + 2)],
    }
