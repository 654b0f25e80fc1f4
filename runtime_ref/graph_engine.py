"""The round on a bundle's two graphs, whatever runs them: a target and a drafter over one KV cache in host memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime_ref.acceptance import Round, accept
from runtime_ref.manifest import SLIDE, Manifest, round_up
from runtime_ref.sampling import Sampling, choose, log_probabilities

CACHE_STEP = 256  # rows the cache grows by: short texts stay small, and growing is too rare to matter


class BoundGraph(Protocol):
    """One loaded graph that reads, and in the target's case writes, the cache in the host's memory."""

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Use these cache buffers, by name, from now on."""
        ...

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs that are not cache buffers, in the graph's order; `inputs` are in the graph's order as well."""
        ...


class Rows(Protocol):
    """An embedding table."""

    def __getitem__(self, ids: Sequence[int], /) -> np.ndarray:
        """Rows [T, columns] float32 of the ids."""
        ...


class GraphEngine:
    """Runs the graphs `target` and `drafter`; the cache starts small and grows up to `max_seq_len`.

    Sliding layers' buffers stop growing where their window ends: row 0 of them holds position `window_start`.
    """

    def __init__(self, manifest: Manifest, graphs: Mapping[str, BoundGraph], tables: Mapping[str, Rows]) -> None:
        self.manifest = manifest
        self.position = self.window_start = 0
        self.graphs, self.tables = graphs, tables
        self._state = np.zeros((1, manifest.hidden_size), np.float32)
        self.cache: dict[str, np.ndarray] = {
            kv.name: np.zeros((kv.num_key_value_heads, 0, kv.head_dim), np.float32) for kv in manifest.kv
        }
        self._sliding = {kv.name for kv in manifest.kv if kv.layer_type == "sliding_attention"}

    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0) -> Round:
        for first, chunk in chunks(tokens, self.manifest.limits["num_tokens"], start):
            self.position = first
            logits, ids, states = self.run_target(chunk, [len(chunk) - 1])
        self.position = len(tokens)
        return self._chosen([], logits, ids, states, sampling)

    def keeps(self, position: int) -> bool:
        return self.window_start <= self._window_start(position)

    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        logits, ids, states = self.run_target([last, *drafts], range(len(drafts) + 1))
        self.position += 1
        return self._chosen(drafts, logits, ids, states, sampling)

    def _chosen(
        self, drafts: Sequence[int], logits: np.ndarray, ids: np.ndarray, states: np.ndarray, sampling: Sampling
    ) -> Round:
        """The round that these outputs make, the first of them for the token at `position`."""
        ranks = [choose(row, self.position + i, sampling) for i, row in enumerate(logits)]
        accepted, tokens = accept(drafts, [int(row[rank]) for row, rank in zip(ids, ranks, strict=True)])
        # Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        self.position += accepted
        self._state = states[accepted : accepted + 1]
        found = log_probabilities(logits[: accepted + 1])
        return Round(drafts, accepted, tokens, [float(row[rank]) for row, rank in zip(found, ranks, strict=False)])

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        token, state, drafts = last, self._state, []
        for _ in range(num_draft_tokens):
            token, state = self.draft_step(token, state)
            drafts.append(token)
        return drafts

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        """One draft token and its state [1, E]; the position stays that of `last`, as it was in training."""
        draft, next_state = self.graphs["drafter"].run(
            embedded=self.tables["embed_tokens"][[token]],
            state=state,
            position=np.array([self.position]),
            window_start=np.array([self.window_start]),
        )
        return int(draft[0]), next_state

    def run_target(self, tokens: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Write the tokens' K/V from `position` on; return top logits, top ids and states of the given rows."""
        if (end := self.position + len(tokens)) > self.manifest.max_seq_len:
            raise ValueError(f"{end} cache rows asked for, the bundle has {self.manifest.max_seq_len}")
        # What fills up to the multiple is computed and dropped; the row it writes is masked like a rejected one.
        ids, wanted = (_filled(list(part), self.manifest.row_multiple) for part in (tokens, rows))
        self._make_room(len(ids))
        outputs = self.graphs["target"].run(
            embedded=self.tables["embed_tokens"][ids],
            per_layer=self.tables["embed_tokens_per_layer"][ids],
            position=np.array([self.position]),
            window_start=np.array([self.window_start]),
            output_rows=np.array(wanted),
        )
        return [output[: len(rows)] for output in outputs]

    def _window_start(self, position: int) -> int:
        """Where sliding layers' buffers may begin at most, so that tokens from a position on see all they may see."""
        return max(0, position - self.manifest.sliding_window - 2) // SLIDE * SLIDE

    def _make_room(self, count: int) -> None:
        """Let the buffers hold so many rows after `position`: they grow, then those of sliding layers move up."""
        limits = self.manifest.limits
        if self.position == 0:
            self.window_start = 0
        if self.position + count - self.window_start > limits["window_rows"]:
            start = self._window_start(self.position)
            moved = start - self.window_start
            for name in self._sliding:
                self.cache[name][:, :-moved] = self.cache[name][:, moved:].copy()
            self.window_start = start
        grown = False
        for name, old in self.cache.items():
            used = self.position + count - (self.window_start if name in self._sliding else 0)
            if used > old.shape[1]:
                limit = limits["window_rows" if name in self._sliding else "cache_rows"]
                rows = min(round_up(used, CACHE_STEP), limit)
                self.cache[name] = np.zeros((old.shape[0], rows, old.shape[2]), np.float32)
                self.cache[name][:, : old.shape[1]] = old
                grown = True
        if grown:
            for graph in self.graphs.values():
                graph.bind(self.cache)


def chunks(tokens: Sequence[int], size: int, start: int = 0) -> Iterator[tuple[int, Sequence[int]]]:
    """Tokens from index `start` on in passes of at most `size`, each with the index of its first token."""
    for first in range(start, len(tokens), size):
        yield first, tokens[first : first + size]


def _filled(items: list[int], multiple: int) -> list[int]:
    """The list with its last item repeated up to a multiple."""
    return items + items[-1:] * (round_up(len(items), multiple) - len(items))
