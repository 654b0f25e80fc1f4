"""What a bundle does while it drafts, taken down, and what eager torch has at the same places of the same text."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.modeling.drafter import KV, kv_by_type
from exporter.modeling.target import Target, empty_kv
from exporter.parity.drafting import DRAFT_STEPS
from runtime_ref.graph_engine import BoundGraph, GraphEngine
from runtime_ref.sampling import Sampling

PROBES = 3  # for each text


@dataclass(frozen=True)
class Snapshot:
    """The cache after so many tokens: the `position` that the runtime has, and of each buffer some of the rows before.

    `rows` has the position of the first of them, and [N, rows, D]; `written` is what the target last wrote there.
    """

    tokens: int
    position: int
    rows: Mapping[str, tuple[int, Tensor]]
    written: Mapping[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A text that a bundle continued by drafting.

    Attributes:
        text: the prompt, `start` tokens, and what follows.
        fed: position of `last` in each round, and the state [E_target] that its first draft step was given.
        snapshots: the cache after the prefill, and its newest rows after each round.
    """

    text: list[int]
    start: int
    drafted: int
    accepted: int
    fed: list[tuple[int, Tensor]]
    snapshots: list[Snapshot]


@dataclass(frozen=True)
class Probe:
    """A round of K draft steps at a position whose next rows hold the text's tokens as well.

    Attributes:
        tokens, states: [K] and [K, E_target], what each step should have been given.
        kv: the shared rows that it could read; sliding ones begin at position `window_start`.
        drafts, next_states: [K] and [K, E_target], what came out.
    """

    position: int
    window_start: int
    tokens: Tensor
    states: Tensor
    kv: KV
    drafts: Tensor
    next_states: Tensor


@dataclass(frozen=True)
class Reading:
    """Eager torch on a text, from the last token of its prompt on: R rows.

    Attributes:
        logits: [R, V].
        states, before_norm: [R, E_target], after and before the final norm.
        kv: K and V of every storing layer, for the whole text.
    """

    logits: Tensor
    states: Tensor
    before_norm: Tensor
    kv: list[Tensor]

    def shared(self, pair: Pair) -> KV:
        return kv_by_type(self.kv, pair.shared_kv)


def read(target: Target, text: Sequence[int], start: int) -> Reading:
    """Run a target over a text whose prompt has `start` tokens."""
    before: list[Tensor] = []
    hook = target.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    kv, rows = empty_kv(target.config, len(text)), torch.arange(start - 1, len(text))
    out = target(torch.tensor(text), torch.tensor([0]), rows, kv)
    hook.remove()
    return Reading(out.logits, out.state, before[0], out.kv)


def write(engine: GraphEngine, prompt: Sequence[int], max_new_tokens: int) -> Written:
    """Let a bundle continue a prompt greedily in rounds, up to the first round with an end token."""
    manifest = engine.manifest
    room = min(len(prompt) + max_new_tokens, manifest.max_seq_len)
    fed, snapshots, drafted, accepted = [], [], 0, 0
    with _recorded(engine) as record:
        text = [*prompt, *engine.prefill(prompt, Sampling()).tokens]
        snapshots.append(_snapshot(engine, record, len(prompt), 0))
        while len(text) < room and text[-1] not in manifest.eos:
            drafts = min(DRAFT_STEPS, manifest.max_draft_tokens, room - len(text) - 1)
            record.calls.clear()
            done = engine.verify(text[-1], engine.draft(text[-1], drafts), Sampling())
            if record.calls:
                fed.append((len(text) - 1, torch.from_numpy(record.calls[0][0][0])))
            text += done.tokens
            drafted, accepted = drafted + drafts, accepted + done.accepted
            snapshots.append(_snapshot(engine, record, len(text) - 1, len(text) - 2 - DRAFT_STEPS))
            if manifest.eos.intersection(done.tokens):
                break
    return Written(text, len(prompt), drafted, accepted, fed, snapshots)


def probes(engine: GraphEngine, pair: Pair, written: Written) -> Iterator[Probe]:
    """Rounds at places spread over the written part of a text."""
    count = min(DRAFT_STEPS, engine.manifest.max_draft_tokens)
    text, last = written.text, len(written.text) - count - 1
    for position in sorted({*np.linspace(written.start, last, PROBES).astype(int).tolist()}):
        if position < written.start:
            return
        engine.prefill(text[:position], Sampling())
        engine.run_target(text[position : position + count + 1], [count])  # as a verify pass before a rollback does
        with _recorded(engine) as record:
            drafts = torch.tensor(engine.draft(text[position], count))
        calls = record.calls
        next_states = torch.from_numpy(np.concatenate([next_state for _, next_state in calls]))
        kv = {}
        for kind, layer in pair.shared_kv.items():
            first = engine.window_start if kind == "sliding_attention" else 0
            rows = slice(0, position + count + 1 - first)
            key, value = (torch.from_numpy(engine.cache[f"{n}_{layer}"][:, rows].copy()) for n in ("key", "value"))
            kv[kind] = (key, value)
        yield Probe(
            position,
            engine.window_start,
            torch.cat((torch.tensor(text[position : position + 1]), drafts[:-1])),
            torch.cat((torch.from_numpy(calls[0][0]), next_states[:-1])),
            kv,
            drafts,
            next_states,
        )


def row_errors(snapshot: Snapshot, wanted: Mapping[str, Tensor], shift: int = 0) -> Tensor:
    """How far each row of a snapshot is from wanted ones: the worst buffer's `row_distance`, oldest row first.

    Args:
        wanted: [N, rows, D] of each buffer, the rows of the snapshot or those of the whole text.
        shift: compares row i with the one that belongs to position i - `shift`.
    """
    low = min(first for first, _ in snapshot.rows.values())
    errors = torch.zeros(snapshot.tokens - low)
    for name, (first, rows) in snapshot.rows.items():
        part = wanted[name].roll(shift, 1)
        part = part if part.shape[1] == rows.shape[1] else part[:, first : snapshot.tokens]
        errors[first - low :] = torch.maximum(errors[first - low :], row_distance(rows, part))
    return errors


def row_distance(rows: Tensor, wanted: Tensor) -> Tensor:
    """Of rows [N, S, D] of a cache: the distance of each from the wanted one, relative to that one's length, [S]."""
    return (rows - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2)).clamp(min=1e-30)


class _Record:
    """What the graphs of an engine are given and give.

    Attributes:
        calls: of the drafter, the state [1, E] given and the next state.
        written: of each buffer and position the row [N, D] that the target last wrote, before anyone else touched it.
    """

    def __init__(self, engine: GraphEngine) -> None:
        self.engine = engine
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []
        self.written: dict[str, dict[int, np.ndarray]] = {buffer.name: {} for buffer in engine.manifest.kv}

    def take_drafter(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        self.calls.append((inputs["state"].copy(), outputs[1].copy()))

    def take_target(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        start, position = int(inputs["window_start"][0]), int(inputs["position"][0])
        for buffer in self.engine.manifest.kv:
            row = position - (start if buffer.layer_type == "sliding_attention" else 0)
            new = self.engine.cache[buffer.name][:, row : row + len(inputs["embedded"])].copy()
            self.written[buffer.name] |= {position + i: new[:, i] for i in range(new.shape[1])}


class _Recorder:
    """A graph that hands its inputs and outputs on."""

    def __init__(
        self, graph: BoundGraph, take: Callable[[Mapping[str, np.ndarray], Sequence[np.ndarray]], None]
    ) -> None:
        self._graph, self._take = graph, take

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self._graph.bind(cache)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        outputs = self._graph.run(**inputs)
        self._take(inputs, outputs)
        return outputs


@contextlib.contextmanager
def _recorded(engine: GraphEngine) -> Iterator[_Record]:
    graphs, record = engine.graphs, _Record(engine)
    takers = {"target": record.take_target, "drafter": record.take_drafter}
    engine.graphs = {name: _Recorder(graphs[name], take) for name, take in takers.items()}
    try:
        yield record
    finally:
        engine.graphs = graphs


def _snapshot(engine: GraphEngine, record: _Record, tokens: int, first: int) -> Snapshot:
    """The rows of a text's tokens from `first` on, or from where a buffer begins."""
    rows, written = {}, {}
    for buffer in engine.manifest.kv:
        start = engine.window_start if buffer.layer_type == "sliding_attention" else 0
        low = max(first, start)
        found = engine.cache[buffer.name][:, low - start : tokens - start]
        rows[buffer.name] = (low, torch.from_numpy(found.copy()))
        by_target = np.stack([record.written[buffer.name][i] for i in range(low, tokens)], 1)
        written[buffer.name] = torch.from_numpy(by_target)
    return Snapshot(tokens, engine.position, rows, written)
