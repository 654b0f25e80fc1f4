"""The engine of a bundle's two graphs, on any runtime: target and drafter over one KV cache in host memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime_ref.acceptance import Round, accept
from runtime_ref.cache import Cache
from runtime_ref.errors import InputError
from runtime_ref.manifest import EMBEDDING, HEAD, PER_LAYER, Manifest, round_up
from runtime_ref.sampling import Chooser

SCORED_ROWS = 2048  # rows of the head that are converted at a time: 25 MB in float64 for E2B
STOPPED = Round([], 0, [], [])  # what a prefill gives that was stopped


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
    """Runs the graphs `target` and `drafter` of a bundle over one cache at a time.

    Attributes:
        manifest: the bundle's.
        cache: what the graphs read and write; another of the same bundle may take its place between two passes.
        graphs: `target` and `drafter`.
        tables: `EMBEDDING`, [V, E]; `PER_LAYER`, [V, layers * P], unless the model has no PLE; `HEAD`, [V, E], if the
            head is not the embedding.
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
        self.cache = Cache(manifest)
        self.graphs, self.tables = graphs, tables
        self._bound: Mapping[str, np.ndarray] | None = None  # the buffers that the graphs use

    @property
    def position(self) -> int:
        """How many rows of the cache are valid."""
        return self.cache.position

    def prefill(
        self, tokens: Sequence[int], sampling: Chooser, start: int = 0, go_on: Callable[[int], bool] = lambda _: True
    ) -> Round:
        """Run a prompt and choose the token after it, as `Engine.prefill`."""
        for first, chunk in chunks(tokens, self.manifest.limits["num_tokens"], start):
            if not go_on(first):
                return STOPPED
            self.cache.roll_back(first)
            logits, ids, states = self.extend(chunk, [len(chunk) - 1])
        return self._finish([], logits, ids, states, sampling) if go_on(len(tokens)) else STOPPED

    def verify(self, last: int, drafts: Sequence[int], sampling: Chooser) -> Round:
        """Run the newest token and the drafts after it, as `Engine.verify`."""
        logits, ids, states = self.run_target([last, *drafts], range(len(drafts) + 1))
        self.cache.tokens.append(last)
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
        # Rejected rows need no clearing: they are masked, and overwritten by the next pass.
        self.cache.tokens += drafts[:accepted]
        self.cache.state = states[accepted : accepted + 1].copy()  # of a pass after which other caches may be used
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
        token, state, drafts = last, self.cache.state, []
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
        self._bind()
        draft, next_state = self.graphs["drafter"].run(
            embedded=self.tables[EMBEDDING][[token]],
            state=state,
            position=np.array([self.position]),
            window_start=np.array([self.cache.window_start]),
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
        self.cache.make_room(len(ids))
        self._bind()
        per_layer = {"per_layer": self.tables[PER_LAYER][ids]} if PER_LAYER in self.tables else {}
        outputs = self.graphs["target"].run(
            embedded=self.tables[EMBEDDING][ids],
            **per_layer,
            position=np.array([self.position]),
            window_start=np.array([self.cache.window_start]),
            output_rows=np.array(output_rows),
        )
        return [output[: len(rows)] for output in outputs]

    def extend(self, tokens: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Run the target, as `run_target`, and move `position` on behind the tokens."""
        outputs = self.run_target(tokens, rows)
        self.cache.tokens += tokens
        return outputs

    def close(self) -> None:
        """Free graphs, tables and the cache, as `Engine.close`."""
        self.graphs, self.tables, self._bound = {}, {}, None
        self.cache = Cache(self.manifest)

    def _bind(self) -> None:
        """Let the graphs use the cache's buffers, if they do not yet: they were moved, or it is another cache."""
        if self._bound is not (buffers := self.cache.buffers):
            self._bound = None  # until all of them are bound
            for graph in self.graphs.values():
                graph.bind(buffers)
            self._bound = buffers


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
