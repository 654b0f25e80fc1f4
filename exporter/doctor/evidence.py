"""Record what a bundle does while it drafts, and what eager torch computes at the same positions of the same text."""

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

PROBES_PER_TEXT = 3


@dataclass(frozen=True)
class Snapshot:
    """Some rows of the KV cache, copied between two passes.

    Attributes:
        tokens: how many tokens the cache should hold.
        position: how many tokens the runtime has counted.
        rows: for each buffer, the position of the first copied row, and the rows [N, rows, D] float32 up to `tokens`.
        written: for each buffer, the rows [N, rows, D] float32 that the target last wrote at the same positions.
    """

    tokens: int
    position: int
    rows: Mapping[str, tuple[int, Tensor]]
    written: Mapping[str, Tensor]


@dataclass(frozen=True)
class Continuation:
    """A prompt that a bundle continued by drafting.

    Attributes:
        text: token ids of the prompt and of the answer.
        start: how many of them are the prompt's.
        drafted: draft tokens in all rounds.
        accepted: how many of them were accepted.
        round_states: for each round that drafts, the position of the token that it drafts after, and the state
            [E_target] float32 that its first draft step was given.
        snapshots: all rows of the cache after the prefill, and its newest rows after each round.
    """

    text: list[int]
    start: int
    drafted: int
    accepted: int
    round_states: list[tuple[int, Tensor]]
    snapshots: list[Snapshot]


@dataclass(frozen=True)
class Probe:
    """A round of K draft steps that a bundle ran while the cache also held rows of the text's next K+1 tokens.

    Attributes:
        position: position of the token that the round drafts after.
        window_start: position of row 0 of the sliding layers' K and V.
        tokens: [K] int64, what each step should be given.
        states: [K, E_target] float32, what each step should be given.
        kv: K and V [N, rows, D] float32 that the drafter could read, by layer type.
        drafts: [K] int64, what each step chose.
        next_states: [K, E_target] float32, what each step returned.
    """

    position: int
    window_start: int
    tokens: Tensor
    states: Tensor
    kv: KV
    drafts: Tensor
    next_states: Tensor


@dataclass(frozen=True)
class EagerOutputs:
    """What a target in eager torch computes for a text, for R positions from the last token of its prompt on.

    Attributes:
        logits: [R, V] float32.
        states: [R, E_target] float32, after the final norm.
        before_norm: [R, E_target] float32, the same states before the final norm.
        kv: K, then V, of every storing layer, each [N, S, D] float32, for the whole text.
    """

    logits: Tensor
    states: Tensor
    before_norm: Tensor
    kv: list[Tensor]

    def shared(self, pair: Pair) -> KV:
        """Return the K and V that the drafter reads, by layer type."""
        return kv_by_type(self.kv, pair.shared_kv)


def run_eager(target: Target, text: Sequence[int], start: int) -> EagerOutputs:
    """Run a target in eager torch over a text.

    Args:
        target: the target.
        text: token ids of a prompt and an answer.
        start: how many of them are the prompt's.
    """
    before: list[Tensor] = []
    hook = target.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    kv, rows = empty_kv(target.config, len(text)), torch.arange(start - 1, len(text))
    out = target(torch.tensor(text), torch.tensor([0]), rows, kv)
    hook.remove()
    return EagerOutputs(out.logits, out.state, before[0], out.kv)


def continue_prompt(engine: GraphEngine, prompt: Sequence[int], max_new_tokens: int) -> Continuation:
    """Let a bundle continue a prompt greedily in rounds, up to the first round with an end token.

    Args:
        engine: runs the bundle.
        prompt: token ids.
        max_new_tokens: length limit of the answer, in tokens.
    """
    manifest = engine.manifest
    room = min(len(prompt) + max_new_tokens, manifest.max_seq_len)
    round_states, snapshots, drafted, accepted = [], [], 0, 0
    with _recording(engine) as record:
        text = [*prompt, *engine.prefill(prompt, Sampling()).tokens]
        snapshots.append(_snapshot(engine, record, len(prompt), 0))
        while len(text) < room and text[-1] not in manifest.eos:
            drafts = min(DRAFT_STEPS, manifest.max_draft_tokens, room - len(text) - 1)
            record.drafter_calls.clear()
            done = engine.verify(text[-1], engine.draft(text[-1], drafts), Sampling())
            if record.drafter_calls:
                round_states.append((len(text) - 1, torch.from_numpy(record.drafter_calls[0][0][0])))
            text += done.tokens
            drafted, accepted = drafted + drafts, accepted + done.accepted
            snapshots.append(_snapshot(engine, record, len(text) - 1, len(text) - 2 - DRAFT_STEPS))
            if manifest.eos.intersection(done.tokens):
                break
    return Continuation(text, len(prompt), drafted, accepted, round_states, snapshots)


def probes(engine: GraphEngine, pair: Pair, continuation: Continuation) -> Iterator[Probe]:
    """Run rounds of a bundle at positions spread over an answer.

    Args:
        engine: runs the bundle; its cache is overwritten.
        pair: the checkpoints that it was made from.
        continuation: a prompt and its answer.
    """
    count = min(DRAFT_STEPS, engine.manifest.max_draft_tokens)
    text, last = continuation.text, len(continuation.text) - count - 1
    for position in sorted({*np.linspace(continuation.start, last, PROBES_PER_TEXT).astype(int).tolist()}):
        if position < continuation.start:
            return
        engine.prefill(text[:position], Sampling())
        engine.run_target(text[position : position + count + 1], [count])  # leaves rows behind, as a rollback does
        with _recording(engine) as record:
            drafts = torch.tensor(engine.draft(text[position], count))
        calls = record.drafter_calls
        next_states = torch.from_numpy(np.concatenate([next_state for _, next_state in calls]))
        kv = {}
        for layer_type, layer in pair.shared_kv.items():
            first = engine.cache.window_start if layer_type == "sliding_attention" else 0
            rows = slice(0, position + count + 1 - first)
            buffers = (engine.cache.buffers[f"{name}_{layer}"] for name in ("key", "value"))
            key, value = (torch.from_numpy(buffer[:, rows].copy()) for buffer in buffers)
            kv[layer_type] = (key, value)
        yield Probe(
            position,
            engine.cache.window_start,
            torch.cat((torch.tensor(text[position : position + 1]), drafts[:-1])),
            torch.cat((torch.from_numpy(calls[0][0]), next_states[:-1])),
            kv,
            drafts,
            next_states,
        )


def row_errors(snapshot: Snapshot, expected: Mapping[str, Tensor], shift: int = 0) -> Tensor:
    """Return how far each row of a snapshot is from the expected row, oldest row first.

    Args:
        snapshot: rows of the cache.
        expected: [N, rows, D] float32 for each buffer, as many rows as the snapshot has or those of the whole text.
        shift: compares row i with the row that belongs to position i - `shift`.

    Returns:
        [rows] float32: the largest `row_distances` over the buffers.
    """
    low = min(first for first, _ in snapshot.rows.values())
    errors = torch.zeros(snapshot.tokens - low)
    for name, (first, rows) in snapshot.rows.items():
        part = expected[name].roll(shift, 1)
        part = part if part.shape[1] == rows.shape[1] else part[:, first : snapshot.tokens]
        errors[first - low :] = torch.maximum(errors[first - low :], row_distances(rows, part))
    return errors


def row_distances(rows: Tensor, expected: Tensor) -> Tensor:
    """Return the distance [S] of each cache row from the expected row, relative to the length of the expected row.

    Args:
        rows: [N, S, D] float32.
        expected: [N, S, D] float32.
    """
    return (rows - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2)).clamp(min=1e-30)


class _Record:
    """Inputs and outputs of an engine's graphs.

    Attributes:
        drafter_calls: for each call of the drafter, the state [1, E_target] that it was given and the state that it
            returned.
        written: for each buffer and position, the row [N, D] that the target last wrote, copied before anything else
            could change it.
    """

    def __init__(self, engine: GraphEngine) -> None:
        self.engine = engine
        self.drafter_calls: list[tuple[np.ndarray, np.ndarray]] = []
        self.written: dict[str, dict[int, np.ndarray]] = {buffer.name: {} for buffer in engine.manifest.kv}

    def add_drafter_call(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        self.drafter_calls.append((inputs["state"].copy(), outputs[1].copy()))

    def add_target_call(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        start, position = int(inputs["window_start"][0]), int(inputs["position"][0])
        for buffer in self.engine.manifest.kv:
            row = position - (start if buffer.layer_type == "sliding_attention" else 0)
            new = self.engine.cache.buffers[buffer.name][:, row : row + len(inputs["embedded"])].copy()
            self.written[buffer.name] |= {position + i: new[:, i] for i in range(new.shape[1])}


class _RecordedGraph:
    """A graph that reports the inputs and outputs of each call."""

    def __init__(
        self, graph: BoundGraph, report: Callable[[Mapping[str, np.ndarray], Sequence[np.ndarray]], None]
    ) -> None:
        self._graph, self._report = graph, report

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        self._graph.bind(cache)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        outputs = self._graph.run(**inputs)
        self._report(inputs, outputs)
        return outputs


@contextlib.contextmanager
def _recording(engine: GraphEngine) -> Iterator[_Record]:
    graphs, record = engine.graphs, _Record(engine)
    reports = {"target": record.add_target_call, "drafter": record.add_drafter_call}
    engine.graphs = {name: _RecordedGraph(graphs[name], report) for name, report in reports.items()}
    try:
        yield record
    finally:
        engine.graphs = graphs


def _snapshot(engine: GraphEngine, record: _Record, tokens: int, first: int) -> Snapshot:
    """Copy the cache rows from position `first` on, or from the first position that a buffer holds, up to `tokens`."""
    rows, written = {}, {}
    for buffer in engine.manifest.kv:
        start = engine.cache.window_start if buffer.layer_type == "sliding_attention" else 0
        low = max(first, start)
        part = engine.cache.buffers[buffer.name][:, low - start : tokens - start]
        rows[buffer.name] = (low, torch.from_numpy(part.copy()))
        by_target = np.stack([record.written[buffer.name][i] for i in range(low, tokens)], 1)
        written[buffer.name] = torch.from_numpy(by_target)
    return Snapshot(tokens, engine.position, rows, written)
