"""Texts with known acceptance, and what a way to choose the number of drafts takes for them at given costs.

Nothing is run: a text is its tokens, and for each of them how many drafts after it would be accepted. That depends on
the text alone, so any choice can be tried on it, and the best fixed number of drafts be known in hindsight.
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

MOST = 8  # drafts a round
WRONG = -1

RECORDED = Path(__file__).with_name("traces.json")  # by `python -m exporter.bench.draft_length --record`


@dataclass(frozen=True)
class Trace:
    """A text: its tokens, how many of them are the prompt, and how many drafts after each token would be accepted."""

    tokens: Sequence[int]
    accepted: Sequence[int]
    prompt: int = 1


@dataclass(frozen=True)
class Texts:
    """Texts of one kind, one after the other."""

    name: str
    kind: str
    texts: Sequence[Trace]


@dataclass(frozen=True)
class CostTable:
    """Costs beside a plain pass: of passes of 1 to `MOST` + 1 tokens, and of a draft step."""

    passes: Sequence[float]
    step: float
    row_multiple: int = 1


# Measured on two threads of an EPYC (Zen 4): E2B `int4` after 512 tokens, the built-in pair after a few, llama.cpp's
# Q4_0 of the same E2B; README has the figures, and those between are on the line. Made up: a GPU, where a pass of nine
# costs hardly more than one; a pass that grows by 0.3 a token; and one that grows by a whole one, which gains nothing.
COSTS = {
    "E2B, ExecuTorch": CostTable((1, 1.28, 1.39, 1.48, 1.5, 1.58, 1.66, 1.75, 1.8), 0.035),
    "E2B, ONNX Runtime": CostTable((1, 1, 1.41, 1.41, 1.88, 1.88, 2.2, 2.2, 2.6), 0.04, 2),
    "built-in pair, ONNX Runtime": CostTable((1, 1, 1.3, 1.3, 1.6, 1.6, 1.9, 1.9, 2.2), 0.25, 2),
    "E2B, llama.cpp": CostTable((1, 1.65, 2.2, 2.25, 2.9, 3.2, 3.6, 4.07, 4.4), 0.1),
    "like a GPU": CostTable(tuple(1 + 0.01 * i for i in range(9)), 0.06),
    "linear": CostTable(tuple(1 + 0.3 * i for i in range(9)), 0.1),
    "hopeless": CostTable(tuple(1.0 + i for i in range(9)), 0.1),
}


class Drafts(Protocol):
    """What chooses drafts, as `runtime_ref.drafts` has it."""

    @property
    def source(self) -> str: ...
    def make(self, last: int, most: int) -> Sequence[int]: ...
    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None: ...


class TraceEngine:
    """Stands in for a bundle: drafts are right as often as the trace says."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.position = trace, trace.prompt

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Right tokens, then wrong ones."""
        right = self.trace.tokens[self.position + 1 :][: self.trace.accepted[self.position]]
        return [*right, *[WRONG] * num_draft_tokens][:num_draft_tokens]

    def verify(self, drafts: Sequence[int]) -> Round:
        """Accept, and move on."""
        choices = self.trace.tokens[self.position + 1 : self.position + 2 + len(drafts)]
        accepted, tokens = accept(drafts, choices)
        self.position += len(tokens)
        return Round(drafts, accepted, tokens, [0.0] * len(tokens))


Choose = Callable[[TraceEngine], Drafts]  # at the start of each text


def simulate(texts: Texts, table: CostTable, choose: Choose) -> tuple[float, int]:
    """What the texts cost, in plain passes, and how many those would be."""
    total, tokens = 0.0, 0
    for trace in texts.texts:
        engine = TraceEngine(trace)
        drafts = choose(engine)
        while (left := len(trace.tokens) - 1 - engine.position) > 0:
            proposed = drafts.make(trace.tokens[engine.position], min(MOST, left - 1))
            done = engine.verify(proposed)
            steps = len(proposed) if drafts.source == DRAFTER else 0
            drafts.learn(done, steps * table.step, table.passes[len(proposed)])
            total += table.passes[len(proposed)] + steps * table.step
            tokens += len(done.tokens)
    return total, tokens


def fixed(num_draft_tokens: int) -> Choose:
    """The same number each round."""
    return lambda engine: _Heuristic(engine, num_draft_tokens, lambda drafts, *_: drafts)


def transformers_heuristic(engine: TraceEngine) -> Drafts:
    """Two more after a round that was accepted as a whole, else one fewer; from 5 on, as transformers' default is."""
    return _Heuristic(engine, 5, lambda drafts, share: drafts + 2 if share == 1 else max(1, drafts - 1))


def rule_of_thumb(start: int) -> Choose:
    """Two fewer below an half accepted, one more above 0.85: a published rule, with a start for each kind of text."""

    def change(drafts: int, share: float) -> int:
        return max(1, drafts - 2) if share < 0.5 else drafts + (share > 0.85)

    return lambda engine: _Heuristic(engine, start, change)


def planned(table: CostTable, known: bool = True, lookups: bool = True) -> Choose:
    """The product's own, which remembers from text to text. Costs that it does not know it measures."""
    costs = Costs(MOST, table.row_multiple)
    if known:
        passes = {str(tokens): cost for tokens, cost in enumerate(table.passes, start=1)}
        costs.restore({"verify_seconds": passes, "draft_step_seconds": table.step})
    length = DraftLength(MOST, costs)

    def choose(engine: TraceEngine) -> Drafts:
        drafts = PlannedDrafts(cast(Engine, engine), length, engine.trace.tokens[: engine.trace.prompt])
        if not lookups:
            drafts.lookup.find = lambda max_tokens: (0, [])  # type: ignore[method-assign]
        return drafts

    return choose


class _Heuristic:
    source = DRAFTER

    def __init__(self, engine: TraceEngine, start: int, change: Callable[[int, float], int]) -> None:
        self._engine, self._drafts, self._change = engine, start, change

    def make(self, last: int, most: int) -> Sequence[int]:
        return self._engine.draft(last, min(self._drafts, most))

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        if done.drafts:
            self._drafts = min(MOST, self._change(self._drafts, done.accepted / len(done.drafts)))


Chances = Callable[[random.Random], Iterator[Sequence[float]]]  # by position of the draft, for each token of a text


def synthetic(chances: Chances, seed: int, length: int = 1200) -> Trace:
    """A text whose drafts are accepted with these chances; no token comes twice, so nothing can be looked up."""
    generator = random.Random(seed)
    accepted = []
    for by_position, _ in zip(chances(generator), range(length), strict=False):
        draws = [generator.random() < chance for chance in by_position]
        accepted.append(draws.index(False) if False in draws else len(draws))
    return Trace(range(length), accepted)


def steady(*by_position: float) -> Chances:
    """Always the same chances; the last one given holds for all positions after it."""
    chances = [*by_position, *[by_position[-1]] * MOST][:MOST]

    def forever(_: random.Random) -> Iterator[Sequence[float]]:
        while True:
            yield chances

    return forever


def stretches(*parts: tuple[float, int]) -> Chances:
    """Chances that hold for so many tokens, then the next ones, in turn."""

    def cycle(_: random.Random) -> Iterator[Sequence[float]]:
        while True:
            for chance, tokens in parts:
                yield from [[chance] * MOST] * tokens

    return cycle


def bursts(high: float, low: float, tokens: int) -> Chances:
    """Two chances, which change places after so many tokens on average."""

    def switch(generator: random.Random) -> Iterator[Sequence[float]]:
        now, other = high, low
        while True:
            if generator.random() < 1 / tokens:
                now, other = other, now
            yield [now] * MOST

    return switch


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
    """A text of each process."""
    return [Texts(name, kind, [synthetic(chances, seed)]) for name, (kind, chances) in PROCESSES.items()]


def recorded_texts() -> list[Texts]:
    """What the built-in pair wrote or was given to write, by kind."""
    found = json.loads(RECORDED.read_text())
    return [Texts(name, "recorded", [Trace(**trace) for trace in traces]) for name, traces in found.items()]
