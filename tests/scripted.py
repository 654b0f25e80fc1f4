"""Decoders that write what a test says."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from exporter.checkpoint.special_tokens import SpecialTokens
from runtime_ref.acceptance import Round
from runtime_ref.cache import Cache
from runtime_ref.chat import ChatTemplate
from runtime_ref.costs import Costs
from runtime_ref.draft_length import DraftLength
from runtime_ref.sampling import Sampling
from runtime_ref.streaming import Decoder
from runtime_ref.tokenizer import TextTokenizer


class Script:
    """An engine that writes given tokens, whatever it is asked."""

    def __init__(self, tokens: SpecialTokens, script: Sequence[int]) -> None:
        self.manifest: Any = SimpleNamespace(
            **{"max_seq_len": 4096, "vocab_size": 2064, "max_draft_tokens": 4, "row_multiple": 1},
            **{
                "eos": frozenset(tokens.eos),
                "sampling": Sampling(),
                "repetition_penalty": 1.0,
                "channels": tokens.channels,
            },
            parts=tokens.parts,
            kv=(),
            sliding_window=1,
            hidden_size=1,
        )
        self.cache, self._script = Cache(self.manifest), iter(script)

    def prefill(self, tokens: Sequence[int], sampling: Sampling, start: int = 0, go_on: Any = None) -> Round:
        return self.verify(tokens[-1], [], sampling)

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        return []

    def verify(self, last: int, drafts: Sequence[int], sampling: Sampling) -> Round:
        return Round([], 0, [next(self._script)], [0.0])


def scripted(
    tokens: SpecialTokens, script: Sequence[int], tokenizer: TextTokenizer, template: ChatTemplate | None
) -> Decoder:
    """Return a decoder that writes given tokens, text after text.

    Args:
        tokens: special tokens of its bundle.
        script: ids of the tokens.
        tokenizer: the bundle's.
        template: the bundle's chat template, if it has one.
    """
    return Decoder(Path("b"), Script(tokens, script), tokenizer, DraftLength(4, Costs(4)), template=template)
