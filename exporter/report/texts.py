"""What drafting does to text: each number of drafts continues the same prompts, in turns, and is timed and counted."""

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

OPENINGS, OPENING_TOKENS = (4, 16), 12  # least and most of them, and their tokens
LENGTHS = (1, 2, 4, 8)  # drafts a round that are measured, with the bundle's default and its most
TURNS = (3, 9)  # least and most


@dataclass(frozen=True)
class Text:
    """A continuation. The first token is the prefill's; `drafted` says of each token whether it was a draft."""

    tokens: list[int]
    drafted: list[bool]
    rounds: list[Round]
    decode_seconds: float


# Texts by number of drafts a round, None for as many as the runtime chooses; one list a turn.
Runs = dict[int | None, list[list[Text]]]


def speak(engine: Engine, prompt: Sequence[int], options: Options, length: DraftLength | None = None) -> Text:
    """Continue a prompt, and keep what each round did; `length` plans the rounds if the options do not.

    Raises:
        InputError: the prompt cannot be run.
    """
    stats = Stats()
    first, *done = decode(engine, prompt, options, stats, length)
    tokens, drafted = list(first.tokens), [False]
    for one in done:
        tokens += one.tokens
        drafted += [i < one.accepted for i in range(len(one.tokens))]
    return Text(tokens, drafted, done, stats.decode_seconds)


def openings(engine: Engine, max_new_tokens: int) -> list[list[int]]:
    """Prompts where none were given: the beginning-of-text token and what the target says after it at temperature 1.

    Random ids would be no text, and nothing that is no text can be drafted well. There are as many as give some rounds
    to count: texts that end early are followed by others.

    Raises:
        InputError: the context has no room for them.
    """
    manifest = engine.manifest
    most, said = max(1, min(OPENING_TOKENS, manifest.max_seq_len // 4)), 0
    found: list[list[int]] = []
    while len(found) < OPENINGS[0] or (len(found) < OPENINGS[1] and said < OPENINGS[0] * max_new_tokens):
        sampling = Sampling(1.0, seed=len(found))
        tokens = speak(engine, [manifest.bos], Options(most, 0, sampling)).tokens
        found.append([manifest.bos, *(token for token in tokens if token not in manifest.eos)])
        said += len(speak(engine, found[-1], Options(max_new_tokens, 0)).tokens)
    return found


def lengths(default: int, most: int) -> list[int]:
    """The numbers of drafts that are measured."""
    return sorted({k for k in (*LENGTHS, default, most) if 0 < k <= most})


def take_turns(
    engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int, drafts: Sequence[int | None], seconds: float
) -> Runs:
    """Texts by number of drafts a round, one list a turn; each turn has another order.

    None plans rounds with nothing known at first, as in an app that runs a bundle for the first time. Turns end when
    `seconds` for each number have passed, but not before three.
    """
    manifest = engine.manifest
    length = DraftLength(manifest.max_draft_tokens, Costs(manifest.max_draft_tokens, manifest.row_multiple))
    runs: Runs = {k: [] for k in drafts}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in turns(seconds * len(runs), *TURNS):
        shuffle(order)
        for k in order:
            runs[k].append([speak(engine, prompt, Options(max_new_tokens, k), length) for prompt in prompts])
    return runs


def check_length(texts: Sequence[Text], drafts: int) -> None:
    """Refuse texts of which nothing can be timed, or in which nothing was drafted.

    Raises:
        InputError: each of them ends too soon.
    """
    rounds = [done for text in texts for done in text.rounds]
    if not any(done.drafts or not drafts for done in rounds):
        raise InputError(
            "each text ends before a round with drafts, so there is nothing to report; pass other --prompt-ids, or a"
            " larger --max-new-tokens"
        )


def speed(runs: Runs) -> dict[str, Any]:
    """Tokens a second by number of drafts, of decoding alone, and how many times faster than plain in the same turn."""
    plain = [_seconds(turn) for turn in runs[0]]
    tokens = [text.tokens for text in runs[0][0]]
    fixed = sorted(k for k in runs if k is not None)
    return {
        "measured": [{"num_draft_tokens": k, **_rates(runs[k], plain)} for k in fixed],
        "auto": {**_rates(runs[None], plain), **controller_choice(runs[None][-1])} if None in runs else None,
        "same_tokens": all([text.tokens for text in turn] == tokens for texts in runs.values() for turn in texts),
        "turns": len(plain),
    }


def controller_choice(texts: Sequence[Text]) -> dict[str, Any]:
    """How many rounds had how many drafts, the drafter's or looked up, where nobody fixed their number."""
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
    """Drafts accepted: of all, and by position in the round.

    There are as many positions as the longest round had drafts, which short texts leave no room for.
    `accepted_share` is of all drafts proposed at a position, `conditional` of those after accepted ones only, which
    are `reached`; None where there was none.
    """
    rounds = [done for text in texts for done in text.rounds]
    stats = Stats()
    for done in rounds:
        stats.add(done, DRAFTER)
    positions = []
    for i, (proposed, kept) in enumerate(zip(stats.drafted_by_position, stats.accepted_by_position, strict=True)):
        reached = sum(len(done.drafts) > i and done.accepted >= i for done in rounds)
        positions.append(
            {
                "position": i + 1,
                "drafted": proposed,
                "reached": reached,
                "accepted": kept,
                "accepted_share": kept / proposed,
                "conditional": kept / reached if reached else None,
            }
        )
    return {
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "rate": stats.acceptance_rate,
        "by_position": positions,
    }


def tokens_per_round(texts: Sequence[Text], drafts: int) -> dict[str, Any]:
    """How many rounds gave 1, 2, .. K+1 tokens."""
    counts = Counter(len(done.tokens) for text in texts for done in text.rounds)
    rounds = sum(counts.values())
    return {
        "rounds": rounds,
        "mean": sum(tokens * count for tokens, count in counts.items()) / rounds,
        "distribution": [{"tokens": tokens, "rounds": counts[tokens]} for tokens in range(1, drafts + 2)],
    }
