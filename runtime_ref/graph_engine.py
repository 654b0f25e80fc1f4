"""The round on a bundle's two graphs, whatever runs them: a target and a drafter over one KV cache in host memory."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime_ref.acceptance import Round, accept
from runtime_ref.manifest import Manifest
from runtime_ref.sampling import Sampling, choose

CACHE_STEP = 256  # rows the cache grows by: short texts stay small, and growing is too rare to matter


class BoundGraph(Protocol):
    """One loaded graph that reads, and in the target's case writes, the cache in the host's memory."""

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Use these cache buffers, by name, from now on."""
        ...

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs that are not cache buffers, in the graph's order; `inputs` are in the graph's order as well."""
        ...


class GraphEngine:
    """Runs the graphs `target` and `drafter`; the cache starts small and grows up to `max_seq_len`."""

    def __init__(self, manifest: Manifest, graphs: Mapping[str, BoundGraph]) -> None:
        self.manifest = manifest
        self.position = 0
        self.graphs = graphs
        self._state = np.zeros((1, manifest.hidden_size), np.float32)
        self._rows = 0
        self.cache: dict[str, np.ndarray] = {
            kv.name: np.zeros((kv.num_key_value_heads, 0, kv.head_dim), np.float32) for kv in manifest.kv
        }

    def prefill(self, tokens: Sequence[int], sampling: Sampling) -> int:
        self.position, step = 0, self.manifest.limits["num_tokens"]
        for start in range(0, len(tokens), step):
            chunk = tokens[start : start + step]
            logits, ids, states = self.run_target(chunk, [len(chunk) - 1])
            self.position += len(chunk)
        self._state = states
        return choose(logits[0], ids[0], self.position, sampling)

    def round(self, last: int, num_draft_tokens: int, sampling: Sampling) -> Round:
        drafts = self.draft(last, num_draft_tokens)
        logits, ids, states = self.run_target([last, *drafts], range(len(drafts) + 1))
        choices = [choose(logits[i], ids[i], self.position + 1 + i, sampling) for i in range(len(ids))]
        accepted, tokens = accept(drafts, choices)
        # Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        self.position += len(tokens)
        self._state = states[accepted : accepted + 1]
        return Round(drafts, accepted, tokens)

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Draft tokens after `last`, from the state before it."""
        token, state, drafts = last, self._state, []
        for _ in range(num_draft_tokens):
            token, state = self.draft_step(token, state)
            drafts.append(token)
        return drafts

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        """One draft token and its state [1, E]; the position stays that of `last`, as it was in training."""
        position = np.array([self.position])
        draft, next_state = self.graphs["drafter"].run(token=np.array([token]), state=state, position=position)
        return int(draft[0]), next_state

    def run_target(self, tokens: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Write the tokens' K/V from `position` on; return top logits, top ids and states of the given rows."""
        self._grow(self.position + len(tokens))
        return self.graphs["target"].run(
            tokens=np.asarray(tokens, np.int64), position=np.array([self.position]), output_rows=np.asarray(rows)
        )

    def _grow(self, rows: int) -> None:
        """Make room for so many cache rows, keeping those there are."""
        if rows <= self._rows:
            return
        if rows > self.manifest.max_seq_len:
            raise ValueError(f"{rows} cache rows asked for, the bundle has {self.manifest.max_seq_len}")
        self._rows = min(-(-rows // CACHE_STEP) * CACHE_STEP, self.manifest.limits["cache_rows"])
        for name, old in self.cache.items():
            self.cache[name] = np.zeros((old.shape[0], self._rows, old.shape[2]), np.float32)
            self.cache[name][:, : old.shape[1]] = old
        for graph in self.graphs.values():
            graph.bind(self.cache)
