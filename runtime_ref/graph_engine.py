"""The engine of a bundle's two graphs, on any runtime: target and drafter over one KV cache in host memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime_ref.acceptance import Round, accept
from runtime_ref.errors import InputError
from runtime_ref.manifest import EMBEDDING, HEAD, PER_LAYER, SLIDE_ROWS, Manifest, round_up
from runtime_ref.sampling import Chooser

CACHE_STEP_ROWS = 256  # the cache grows by these: short texts stay small, and growing is too rare to matter
SCORED_ROWS = 2048  # rows of the head that are converted at a time: 25 MB in float64 for E2B


class BoundGraph(Protocol):
    """A loaded graph that reads the KV cache in host memory; the target's graph writes it as well."""

    def bind(self, cache: Mapping[str, np.ndarray]) -> None:
        """Use these cache buffers from now on.

        Args:
            cache: by name, of the manifest's layout and dtype. The graph reads and writes their memory in place.
        """
        ...

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph.

        Args:
            inputs: those that are not cache buffers, in the manifest's order; FORMAT.md has their shapes.

        Returns:
            Outputs that are not cache buffers, in the manifest's order.
        """
        ...


class EmbeddingTable(Protocol):
    """An embedding table that is read row by row."""

    def __getitem__(self, ids: Sequence[int], /) -> np.ndarray:
        """Return the rows of token ids, [T, columns] float32."""
        ...


class GraphEngine:
    """Runs the graphs `target` and `drafter` of a bundle. The cache starts small and grows up to `max_seq_len` rows.

    Buffers of sliding layers stop growing at the size of their window; their rows move up in steps of `SLIDE_ROWS`.

    Attributes:
        manifest: the bundle's.
        position: how many positions are valid in the cache.
        window_start: the position that row 0 of sliding layers' buffers holds.
        graphs: `target` and `drafter`.
        tables: `EMBEDDING`, [V, E]; `PER_LAYER`, [V, layers * P], unless the model has no PLE; `HEAD`, [V, E], if the
            head is not the embedding.
        cache: buffers by name, of the manifest's layout and dtype.
    """

    def __init__(
        self, manifest: Manifest, graphs: Mapping[str, BoundGraph], tables: Mapping[str, EmbeddingTable]
    ) -> None:
        """Begin with an empty cache.

        Args:
            manifest: the bundle's.
            graphs: loaded graphs by name.
            tables: embedding tables by name.
        """
        self.manifest = manifest
        self.position = self.window_start = 0
        self.graphs, self.tables = graphs, tables
        self._state = np.zeros((1, manifest.hidden_size), np.float32)
        self.cache: dict[str, np.ndarray] = {kv.name: np.zeros(kv.shape(0), kv.dtype) for kv in manifest.kv}

    def prefill(self, tokens: Sequence[int], sampling: Chooser, start: int = 0) -> Round:
        """Run a prompt and choose the token after it, as `Engine.prefill`."""
        for first, chunk in chunks(tokens, self.manifest.limits["num_tokens"], start):
            self.position = first
            logits, ids, states = self.run_target(chunk, [len(chunk) - 1])
        self.position = len(tokens)
        return self._finish([], logits, ids, states, sampling)

    def can_resume(self, position: int) -> bool:
        """Return whether the cache has every row that tokens from `position` on attend to, as `Engine.can_resume`."""
        return self.window_start <= self._window_start(position)

    def verify(self, last: int, drafts: Sequence[int], sampling: Chooser) -> Round:
        """Run the newest token and the drafts after it, as `Engine.verify`."""
        logits, ids, states = self.run_target([last, *drafts], range(len(drafts) + 1))
        self.position += 1
        return self._finish(drafts, logits, ids, states, sampling)

    def _finish(
        self, drafts: Sequence[int], logits: np.ndarray, ids: np.ndarray, states: np.ndarray, sampling: Chooser
    ) -> Round:
        """Choose tokens from a pass's outputs, the first for the token at `position`; accept drafts and roll back."""
        logprobs: list[float] = []

        def choices() -> Iterator[int]:
            for i, row in enumerate(zip(logits, ids, states, strict=True)):
                try:
                    token, logprob = sampling.pick(*row, self.position + i)
                except InputError:  # rules leave no token here: what was chosen is given out first
                    if i == 0:
                        raise
                    return
                logprobs.append(logprob)
                yield token

        accepted, tokens = accept(drafts, choices())
        # Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        self.position += accepted
        self._state = states[accepted : accepted + 1]
        return Round(drafts, accepted, tokens, logprobs)

    def score(self, state: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """Compute logits of any tokens from a state, as `Engine.score`."""
        head = self.tables[HEAD] if HEAD in self.tables else self.tables[EMBEDDING]
        exact = state.astype(np.float64)
        rows = (head[chunk].astype(np.float64) for _, chunk in chunks(ids, SCORED_ROWS))
        products = np.concatenate([part @ exact for part in rows] or [np.empty(0)])
        softcap = self.manifest.raw["target"].get("final_logit_softcapping")
        return (softcap * np.tanh(products / softcap) if softcap else products).astype(np.float32)

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Return draft tokens after the newest token, as `Engine.draft`."""
        token, state, drafts = last, self._state, []
        for _ in range(num_draft_tokens):
            token, state = self.draft_step(token, state)
            drafts.append(token)
        return drafts

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        """Run the drafter once. The position stays that of the newest token in every step, as it was in training.

        Args:
            token: id of the newest token, or of the draft before.
            state: [1, E] float32, the target's state of the newest token, or the state of the draft before.

        Returns:
            The id of the draft token, and its state [1, E] float32.
        """
        draft, next_state = self.graphs["drafter"].run(
            embedded=self.tables[EMBEDDING][[token]],
            state=state,
            position=np.array([self.position]),
            window_start=np.array([self.window_start]),
        )
        return int(draft[0]), next_state

    def run_target(self, tokens: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Run the target, which writes the tokens' keys and values from `position` on; `position` stays as it is.

        Args:
            tokens: T token ids, at most the manifest's `num_tokens`.
            rows: indices into `tokens` of the R rows to output, at most `num_outputs`.

        Returns:
            Largest logits [R, k] float32 in falling order, their token ids [R, k] int64, and states [R, E] float32.

        Raises:
            ValueError: the tokens do not fit into `max_seq_len`.
        """
        if (end := self.position + len(tokens)) > self.manifest.max_seq_len:
            raise ValueError(f"{end} cache rows asked for, the bundle has {self.manifest.max_seq_len}")
        # Padding is computed and dropped; the cache row that it writes is masked like a rejected one.
        ids, output_rows = (_padded(list(part), self.manifest.row_multiple) for part in (tokens, rows))
        self._make_room(len(ids))
        per_layer = {"per_layer": self.tables[PER_LAYER][ids]} if PER_LAYER in self.tables else {}
        outputs = self.graphs["target"].run(
            embedded=self.tables[EMBEDDING][ids],
            **per_layer,
            position=np.array([self.position]),
            window_start=np.array([self.window_start]),
            output_rows=np.array(output_rows),
        )
        return [output[: len(rows)] for output in outputs]

    def _window_start(self, position: int) -> int:
        """The last position at which sliding layers' buffers may begin for tokens from `position` on."""
        return max(0, position - self.manifest.sliding_window - 2) // SLIDE_ROWS * SLIDE_ROWS

    def _make_room(self, count: int) -> None:
        """Make room for `count` rows after `position`: move sliding layers' rows up, then grow the buffers."""
        limits = self.manifest.limits
        if self.position == 0:
            self.window_start = 0
        if self.position + count - self.window_start > limits["window_rows"]:
            start = self._window_start(self.position)
            moved = start - self.window_start
            for kv in self.manifest.kv:
                if kv.layer_type == "sliding_attention":
                    rows = np.moveaxis(self.cache[kv.name], kv.rows_axis, 0)
                    rows[:-moved] = rows[moved:].copy()
            self.window_start = start
        grown = False
        for kv in self.manifest.kv:
            sliding, old = kv.layer_type == "sliding_attention", self.cache[kv.name]
            used, allocated = self.position + count - (self.window_start if sliding else 0), old.shape[kv.rows_axis]
            if used > allocated:
                num_rows = min(round_up(used, CACHE_STEP_ROWS), limits["window_rows" if sliding else "cache_rows"])
                self.cache[kv.name] = np.zeros(kv.shape(num_rows), kv.dtype)
                np.moveaxis(self.cache[kv.name], kv.rows_axis, 0)[:allocated] = np.moveaxis(old, kv.rows_axis, 0)
                grown = True
        if grown:
            for graph in self.graphs.values():
                graph.bind(self.cache)


def chunks(tokens: Sequence[int], size: int, start: int = 0) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield the tokens from an index on in chunks, each with the index of its first token.

    Args:
        tokens: token ids.
        size: the largest number of tokens in a chunk.
        start: index of the first token of the first chunk.
    """
    for first in range(start, len(tokens), size):
        yield first, tokens[first : first + size]


def _padded(items: list[int], multiple: int) -> list[int]:
    """The list with its last item repeated up to a multiple."""
    return items + items[-1:] * (round_up(len(items), multiple) - len(items))
