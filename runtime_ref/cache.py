"""The KV cache of one conversation: whose keys and values it has, and the memory that they are in."""

from collections.abc import Mapping, Sequence

import numpy as np

from runtime_ref.acceptance import common_prefix
from runtime_ref.manifest import SLIDE_ROWS, KVBuffer, Manifest, round_up

CACHE_STEP_ROWS = 256  # the cache grows by these: short texts stay small, and growing is too rare to matter


class Cache:
    """What one conversation has in memory. It starts small and grows up to the manifest's limits.

    Buffers of sliding layers stop growing at the size of their window; their rows move up in steps of `SLIDE_ROWS`.
    Rows from `position` on hold anything, for instance those of rejected drafts; later passes overwrite them.

    Attributes:
        manifest: of the bundle whose keys and values it holds.
        tokens: ids of the tokens whose rows are valid, from position 0 on. Appended to after the pass that wrote the
            rows, and cut off before a pass that overwrites them, so that they are right whatever ends a pass early.
        window_start: the position that row 0 of sliding layers' buffers holds.
        buffers: by name, of the manifest's layout and dtype; another mapping whenever one of them is another array.
        state: [1, E] float32, the target's of the newest token of a text that goes on, from which drafting starts.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Begin with no rows.

        Args:
            manifest: the bundle's.
        """
        self.manifest = manifest
        self.tokens: list[int] = []
        self.window_start = 0
        self.buffers: Mapping[str, np.ndarray] = {kv.name: allocate(kv, 0) for kv in manifest.kv}
        self.state = np.zeros((1, manifest.hidden_size), np.float32)

    @property
    def position(self) -> int:
        """How many rows are valid, and so the position of the next token."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, those of rows that are not valid yet among them."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def roll_back(self, position: int) -> None:
        """Keep only the rows before a position.

        Args:
            position: how many rows stay valid.

        Raises:
            ValueError: fewer are valid now.
        """
        if position > self.position:
            raise ValueError(f"{position} cache rows asked for, only {self.position} are valid")
        del self.tokens[position:]

    def can_resume(self, position: int) -> bool:
        """Return whether it still has every row that tokens from a position on attend to.

        Args:
            position: index of the first token that is to be run.
        """
        return self.window_start <= self._window_start(position)

    def reusable(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens need not be run again; its last token always is.

        Args:
            prompt: token ids, at least one.
        """
        shared = common_prefix(self.tokens, prompt[:-1])
        return shared if self.can_resume(shared) else 0

    def make_room(self, count: int) -> None:
        """Make room for rows from `position` on: move sliding layers' rows up, and grow. All of it happens, or nothing.

        Args:
            count: how many rows a pass writes.

        Raises:
            MemoryError: there is no memory for larger buffers; the cache is as it was.
        """
        limits, position = self.manifest.limits, self.position
        start = self.window_start if position else 0
        if position + count - start > limits["window_rows"]:
            start = self._window_start(position)
        changed = {}
        for kv in self.manifest.kv:
            sliding, old = kv.layer_type == "sliding_attention", self.buffers[kv.name]
            first, limit = (start, limits["window_rows"]) if sliding else (0, limits["cache_rows"])
            moved = start - self.window_start if sliding and position else 0
            used, rows = position + count - first, old.shape[kv.rows_axis]
            if used > rows or moved:
                new = allocate(kv, max(rows, min(round_up(used, CACHE_STEP_ROWS), limit)))
                kept = position - first
                np.moveaxis(new, kv.rows_axis, 0)[:kept] = np.moveaxis(old, kv.rows_axis, 0)[moved : moved + kept]
                changed[kv.name] = new
        buffers = {**self.buffers, **changed} if changed else self.buffers
        # Buffers whose rows moved belong to the new start: Ctrl-C may end a function between any two statements.
        self.buffers, self.window_start = buffers, start

    def _window_start(self, position: int) -> int:
        """The last position at which sliding layers' buffers may begin for tokens from `position` on."""
        return max(0, position - self.manifest.sliding_window - 2) // SLIDE_ROWS * SLIDE_ROWS


def allocate(kv: KVBuffer, rows: int) -> np.ndarray:
    """Return a buffer of zeros: what masked rows hold is multiplied by 0, so it must be a number.

    Args:
        kv: the manifest's entry.
        rows: S.
    """
    return np.zeros(kv.shape(rows), kv.dtype)
