"""Simulated decoding of texts with known acceptance, to compare methods of choosing the number of drafts.

No model runs: a text is a list of tokens and, for each of them, how many drafts after it would be accepted. That does
not depend on the method, so every method can be tried on the same text, at given costs of passes and draft steps, and
compared with the best fixed number of drafts in hindsight.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from runtime_ref.acceptance import Round, accept
from runtime_ref.costs import DRAFTER, Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.drafts import PlannedDrafts
from runtime_ref.engine import Engine

MAX_DRAFT_TOKENS = 8  # per round
WRONG_TOKEN = -1

TRACES_FILE = Path(__file__).with_name("traces.json")  # made by `python -m exporter.studies.draft_planning --record`


@dataclass(frozen=True)
class Trace:
    """A text and its acceptance.

    Attributes:
        tokens: token ids of the prompt and its continuation.
        accepted: for each token, how many drafts after it would be accepted.
        prompt: how many of the tokens are the prompt.
    """

    tokens: Sequence[int]
    accepted: Sequence[int]
    prompt: int = 1


@dataclass(frozen=True)
class Texts:
    """Texts that are decoded one after the other.

    Attributes:
        name: what the acceptance of the texts is like.
        category: a group of such names: `steady`, `changing`, `bursty`, `never` or `recorded`.
        texts: the texts.
    """

    name: str
    category: str
    texts: Sequence[Trace]


@dataclass(frozen=True)
class CostTable:
    """Costs relative to a pass of the target over one token.

    Attributes:
        passes: costs of passes over 1 to `MAX_DRAFT_TOKENS` + 1 tokens.
        step: cost of a draft step.
        row_multiple: passes are padded to a multiple of this many tokens.
    """

    passes: Sequence[float]
    step: float
    row_multiple: int = 1


# The first four were measured on two threads of an EPYC (Zen 4), and interpolated linearly between measured lengths:
# E2B `int4` after 512 tokens, the built-in pair after a few, llama.cpp's Q4_0 of the same E2B; see docs/benchmarks.md.
# The others are made up: a GPU, where a pass over nine tokens costs hardly more than one over one token; costs that
# grow by 0.3 per token; and costs that grow by 1 per token, with which drafting can gain nothing.
COSTS = {
    "E2B, ExecuTorch": CostTable((1, 1.28, 1.39, 1.48, 1.5, 1.58, 1.66, 1.75, 1.8), 0.035),
    "E2B, ONNX Runtime": CostTable((1, 1, 1.41, 1.41, 1.88, 1.88, 2.2, 2.2, 2.6), 0.04, 2),
    "built-in pair, ONNX Runtime": CostTable((1, 1, 1.3, 1.3, 1.6, 1.6, 1.9, 1.9, 2.2), 0.25, 2),
    "E2B, llama.cpp": CostTable((1, 1.65, 2.2, 2.25, 2.9, 3.2, 3.6, 4.07, 4.4), 0.1),
    "like a GPU": CostTable(tuple(1 + 0.01 * i for i in range(9)), 0.06),
    "linear": CostTable(tuple(1 + 0.3 * i for i in range(9)), 0.1),
    "each token a full pass": CostTable(tuple(1.0 + i for i in range(9)), 0.1),
}


class Drafts(Protocol):
    """Makes the drafts of a text, as the classes of `runtime_ref.drafts` do."""

    @property
    def source(self) -> str:
        """Where the drafts of the last round came from."""
        ...

    def make(self, last: int, max_drafts: int, /) -> Sequence[int]:
        """Return up to `max_drafts` draft tokens to follow the token id `last`."""
        ...

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float, /) -> None:
        """Learn from a round what was accepted and how long it took; the simulation passes costs for seconds."""
        ...


class TraceEngine:
    """Takes the place of a bundle's engine: as many drafts are right as the trace says.

    Args:
        trace: the text that is decoded.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace, self.position = trace, trace.prompt

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Return `num_draft_tokens` draft tokens to follow `last`: first the right ones, then wrong ones."""
        right = self.trace.tokens[self.position + 1 :][: self.trace.accepted[self.position]]
        return [*right, *[WRONG_TOKEN] * num_draft_tokens][:num_draft_tokens]

    def verify(self, drafts: Sequence[int]) -> Round:
        """Accept the right prefix of the drafts, and advance the position by it and one token more."""
        choices = self.trace.tokens[self.position + 1 : self.position + 2 + len(drafts)]
        accepted, tokens = accept(drafts, choices)
        self.position += len(tokens)
        return Round(drafts, accepted, tokens, [0.0] * len(tokens))


Method = Callable[[TraceEngine], Drafts]  # called at the start of each text


def simulate(texts: Texts, table: CostTable, choose: Method) -> tuple[float, int]:
    """Decode texts with one method.

    Args:
        texts: the texts.
        table: costs of passes and draft steps.
        choose: the method of choosing the number of drafts.

    Returns:
        The cost of all rounds, and the number of tokens that they added, which is the cost of plain decoding.
    """
    total, tokens = 0.0, 0
    for trace in texts.texts:
        engine = TraceEngine(trace)
        drafts = choose(engine)
        while (left := len(trace.tokens) - 1 - engine.position) > 0:
            proposed = drafts.make(trace.tokens[engine.position], min(MAX_DRAFT_TOKENS, left - 1))
            done = engine.verify(proposed)
            steps = len(proposed) if drafts.source == DRAFTER else 0
            drafts.learn(done, steps * table.step, table.passes[len(proposed)])
            total += table.passes[len(proposed)] + steps * table.step
            tokens += len(done.tokens)
    return total, tokens


def fixed(num_draft_tokens: int) -> Method:
    """Return the method that always drafts the same number of tokens."""
    return lambda engine: _Heuristic(engine, num_draft_tokens, lambda drafts, *_: drafts)


def transformers_heuristic(engine: TraceEngine) -> Drafts:
    """Start transformers' heuristic: two drafts more after a round with all accepted, else one fewer; 5 at first."""
    return _Heuristic(engine, 5, lambda drafts, rate: drafts + 2 if rate == 1 else max(1, drafts - 1))


def rule_of_thumb(start: int) -> Method:
    """Return a published method: two drafts fewer after a round with less than 50 % accepted, one more above 85 %.

    Args:
        start: drafts of the first round; the rule recommends one for each type of text.
    """

    def change(drafts: int, rate: float) -> int:
        return max(1, drafts - 2) if rate < 0.5 else drafts + (rate > 0.85)

    return lambda engine: _Heuristic(engine, start, change)


def planned(table: CostTable, costs_known: bool = True, prompt_lookup: bool = True) -> Method:
    """Return this project's own method, which keeps what it has learned from text to text.

    Args:
        table: costs of passes and draft steps.
        costs_known: whether it knows the costs from the start; otherwise it measures them.
        prompt_lookup: whether drafts may be copied from earlier text.
    """
    costs = Costs(MAX_DRAFT_TOKENS, table.row_multiple)
    if costs_known:
        passes = {str(tokens): cost for tokens, cost in enumerate(table.passes, start=1)}
        costs.restore({"verify_seconds": passes, "draft_step_seconds": table.step})
    length = DraftLength(MAX_DRAFT_TOKENS, costs)

    def choose(engine: TraceEngine) -> Drafts:
        drafts = PlannedDrafts(cast(Engine, engine), length, engine.trace.tokens[: engine.trace.prompt])
        if not prompt_lookup:
            drafts.lookup.find = lambda max_tokens: (0, [])  # type: ignore[method-assign]
        return drafts

    return choose


class _Heuristic:
    source = DRAFTER

    def __init__(self, engine: TraceEngine, start: int, change: Callable[[int, float], int]) -> None:
        self._engine, self._drafts, self._change = engine, start, change

    def make(self, last: int, max_drafts: int) -> Sequence[int]:
        return self._engine.draft(last, min(self._drafts, max_drafts))

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        if done.drafts:
            self._drafts = min(MAX_DRAFT_TOKENS, self._change(self._drafts, done.accepted / len(done.drafts)))


# For each token of a text, the probabilities that drafts 1, 2, ... after it are accepted if all before them are.
Chances = Callable[[random.Random], Iterator[Sequence[float]]]


def synthetic(chances: Chances, seed: int, length: int = 1200) -> Trace:
    """Draw a text whose drafts are accepted with given probabilities.

    No token occurs twice, so prompt lookup finds nothing.

    Args:
        chances: the probabilities for each token.
        seed: seed of all draws.
        length: tokens of the text.
    """
    generator = random.Random(seed)
    accepted = []
    for by_position, _ in zip(chances(generator), range(length), strict=False):
        draws = [generator.random() < chance for chance in by_position]
        accepted.append(draws.index(False) if False in draws else len(draws))
    return Trace(range(length), accepted)


def steady(*by_position: float) -> Chances:
    """Return the same probabilities for every token, by position; the last one holds for all later positions."""
    chances = [*by_position, *[by_position[-1]] * MAX_DRAFT_TOKENS][:MAX_DRAFT_TOKENS]

    def forever(_: random.Random) -> Iterator[Sequence[float]]:
        while True:
            yield chances

    return forever


def stretches(*parts: tuple[float, int]) -> Chances:
    """Return probabilities that change in a cycle; each part is a probability and for how many tokens it holds."""

    def cycle(_: random.Random) -> Iterator[Sequence[float]]:
        while True:
            for chance, tokens in parts:
                yield from [[chance] * MAX_DRAFT_TOKENS] * tokens

    return cycle


def bursts(high: float, low: float, tokens: int) -> Chances:
    """Return probabilities that switch between two values at random.

    Args:
        high: the probability at first.
        low: the other one.
        tokens: mean number of tokens between two switches.
    """

    def switch(generator: random.Random) -> Iterator[Sequence[float]]:
        now, other = high, low
        while True:
            if generator.random() < 1 / tokens:
                now, other = other, now
            yield [now] * MAX_DRAFT_TOKENS

    return switch


# Name -> category, and the probabilities.
PROCESSES: Mapping[str, tuple[str, Chances]] = {
    **{f"{chance:.0%}": ("steady", steady(chance)) for chance in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97)},
    "60 %, then better": ("steady", steady(0.6, 0.68, 0.7, 0.75, 0.8)),
    "80 %, then worse": ("steady", steady(0.8, 0.7, 0.6, 0.5, 0.4)),
    "90/10 % by 300": ("changing", stretches((0.9, 300), (0.1, 300))),
    "10/90 % by 200": ("changing", stretches((0.1, 200), (0.9, 200))),
    "95/0 % by 100": ("changing", stretches((0.95, 100), (0.0, 100))),
    "70/30/95 % by 150": ("changing", stretches((0.7, 150), (0.3, 150), (0.95, 150))),
    "0 then 90 %": ("changing", stretches((0.0, 600), (0.9, 600))),
    "90 then 0 %": ("changing", stretches((0.9, 600), (0.0, 600))),
    "95/10 % by about 50": ("bursty", bursts(0.95, 0.1, 50)),
    "95/10 % by about 20": ("bursty", bursts(0.95, 0.1, 20)),
    "80/20 % by about 8": ("bursty", bursts(0.8, 0.2, 8)),
    "never": ("never", steady(0.0)),
}


def synthetic_texts(seed: int) -> list[Texts]:
    """Draw a text of each process in `PROCESSES`."""
    return [Texts(name, category, [synthetic(chances, seed)]) for name, (category, chances) in PROCESSES.items()]


def recorded_texts() -> list[Texts]:
    """Read the texts that were recorded with the built-in pair: generated greedily, sampled, and copied passages."""
    recorded = json.loads(TRACES_FILE.read_text())
    return [Texts(name, "recorded", [Trace(**trace) for trace in traces]) for name, traces in recorded.items()]
