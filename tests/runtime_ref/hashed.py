"""An engine without graphs: each row's state depends on the newest tokens, and its logits are those of a head."""

import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from runtime_ref.decoder import Options, generate
from runtime_ref.draft_length import DraftLength
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.stats import Stats

WIDTH, STATES, NUM_LOGITS = 12, 499, 64
PROMPT = [3, 5, 8]
SOFTCAP = 20.0
MADE: dict[tuple[float, ...], tuple[np.ndarray, np.ndarray]] = {}


class HashedEngine(GraphEngine):
    """Drafts the tokens of `answer`, or the likeliest ones if there is none, each wrong with probability 0.4."""

    answer: Sequence[int] = ()

    def __init__(
        self,
        vocab_size: int,
        seed: int = 0,
        eos: Sequence[int] = (),
        scale: float = 2.0,
        channels: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        manifest: Any = SimpleNamespace(
            **{"vocab_size": vocab_size, "hidden_size": WIDTH, "kv": (), "limits": {"num_tokens": 128}},
            sliding_window=1,
            **{"max_seq_len": 100_000, "max_draft_tokens": 8, "row_multiple": 1, "eos": frozenset(eos)},
            channels=channels,
            raw={"tokens": {}, "target": {"final_logit_softcapping": SOFTCAP}},
        )
        self.random = np.random.default_rng(seed)
        self.head = (self.random.standard_normal((vocab_size, WIDTH)) * scale).astype(np.float32)
        self.states = self.random.standard_normal((STATES, WIDTH)).astype(np.float32)
        super().__init__(manifest, {}, {"embed_tokens": self.head})
        self.all_logits, self.ids = self._logits_and_ids(vocab_size, seed, scale)

    def _logits_and_ids(self, *key: float) -> tuple[np.ndarray, np.ndarray]:
        """The logits of every state, and its largest; kept, since tests make the same engine many times."""
        if key not in MADE:
            logits = np.stack([self.score(state, range(len(self.head))) for state in self.states])
            MADE[key] = logits, np.argsort(-logits, axis=1, kind="stable")[:, :NUM_LOGITS].copy()
            for part in MADE[key]:
                part.flags.writeable = False
        return MADE[key]

    def run_target(self, tokens: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        text = [*self.cache.tokens, *tokens]
        at = [self.row(text[: self.position + row + 1]) for row in rows]
        return [np.take_along_axis(self.all_logits[at], self.ids[at], 1), self.ids[at], self.states[at]]

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        if self.answer:
            at = self.position + 1 - len(PROMPT)
            right = [*self.answer[at : at + num_draft_tokens], *([0] * num_draft_tokens)][:num_draft_tokens]
        else:
            text = [*self.cache.tokens, last]
            for _ in range(num_draft_tokens):
                text.append(int(self.ids[self.row(text)][0]))
            right = text[len(text) - num_draft_tokens :]
        wrong = self.random.random(num_draft_tokens) < 0.4
        return [
            int(self.random.integers(self.manifest.vocab_size)) if w else t for t, w in zip(right, wrong, strict=True)
        ]

    @staticmethod
    def row(text: Sequence[int]) -> int:
        return zlib.crc32(bytes(str((len(text), *text[-2:])), "ascii")) % STATES


def run(engine: HashedEngine, options: Options, planner: DraftLength | None = None) -> tuple[list[int], Stats]:
    stats = Stats()
    return list(generate(engine, PROMPT, options, stats, planner)), stats
