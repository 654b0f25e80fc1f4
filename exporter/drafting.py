"""Many rounds of drafting in one batch, as they should be, or with one thing changed to see what it would do."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from exporter.modeling.drafter import Drafter
from exporter.modeling.two_stage import DenseHead, TwoStageHead

DRAFT_STEPS = 4
FIRST_ROW = torch.zeros(1, dtype=torch.int64)

KV = dict[str, tuple[Tensor, Tensor]]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Change:
    """What a round does otherwise than it should; by default nothing.

    Attributes:
        before_norm: it starts from the target's state before its final norm. Whoever passes states honours this.
        scaled: tokens' embeddings are multiplied by sqrt(hidden size).
        position: added to the position that queries are rotated by, in every step.
        advance: added to it once more with each step of a round.
        masks: the rows in view follow that position, as they do when a graph is given a wrong one.
        newest: 1 shows one row more, which no accepted token wrote; -1 hides the newest.
        shift: rows that the cache lies too far down.
        window: added to the sliding window.
    """

    before_norm: bool = False
    scaled: bool = True
    position: int = 0
    advance: int = 0
    masks: bool = False
    newest: int = 0
    shift: int = 0
    window: int = 0

    @property
    def sees_ahead(self) -> bool:
        """Whether it reads rows that a runtime has not written yet: over a whole text those would tell the answer."""
        return self.newest > 0 or self.shift < 0 or (self.masks and (self.position > 0 or self.advance > 0))


def draft_rounds(
    drafter: Drafter, tokens: Tensor, states: Tensor, positions: Tensor, kv: KV, change: Change = Change()
) -> tuple[Tensor, Tensor]:
    """`DRAFT_STEPS` draft steps of T rounds over one text, each round at a position of its own.

    Args:
        tokens: [T] int64, `last` of each round.
        states: [T, E_target], the target's state before `last`.
        positions: [T] int64, the position of `last`.
        kv: K and V [N, S, D] of the whole text, by layer type; later rows are masked.

    Returns:
        Hidden states [T, DRAFT_STEPS, E] and draft tokens [T, DRAFT_STEPS] int64.
    """
    hiddens, drafts = [], []
    for step in range(DRAFT_STEPS):
        hidden, states = draft_step(drafter, tokens, states, positions, torch.tensor(step), FIRST_ROW, kv, change)
        tokens = drafter.head(hidden)
        hiddens.append(hidden)
        drafts.append(tokens)
    return torch.stack(hiddens, 1), torch.stack(drafts, 1)


def draft_step(
    drafter: Drafter,
    tokens: Tensor,
    states: Tensor,
    positions: Tensor,
    step: Tensor,
    window_start: Tensor,
    kv: KV,
    change: Change = Change(),
) -> tuple[Tensor, Tensor]:
    """One step of T rounds; `step` [] or [T] int64 says which of its round. Returns hidden and next states."""
    offsets = change.position + change.advance * step
    embedded = drafter.target_embed_tokens(tokens)
    if not change.scaled:
        embedded = embedded / drafter.target_embed_tokens.scale
    if change.shift:
        kv = {kind: (_shifted(key, change.shift), _shifted(value, change.shift)) for kind, (key, value) in kv.items()}
    text = drafter.config.text
    text = replace(text, sliding_window=text.sliding_window + change.window)
    config = replace(drafter.config, text=text)
    changed = _alike(drafter, _ChangedDrafter, config=config, change=change, offsets=offsets)
    return changed.step(embedded, states, positions + offsets, window_start, kv)


def _shifted(rows: Tensor, shift: int) -> Tensor:
    """Rows of a cache moved down; at the edge one stays where it was, as when they are copied within a buffer."""
    count = rows.shape[1]
    return rows[:, (torch.arange(count) - shift).clamp(0, count - 1)]


class _ChangedDrafter(Drafter):
    """A drafter that is told a position [T] which is off by `offsets`."""

    change: Change
    offsets: Tensor

    def _mask(self, layer_type: str, positions: Tensor, window_start: Tensor, rows: int) -> Tensor:
        if not self.change.masks:
            positions = positions - self.offsets
        mask = super()._mask(layer_type, positions, window_start, rows)
        if not self.change.newest:
            return mask
        # The window's far end stays: what both masks show, or either.
        combine = torch.maximum if self.change.newest > 0 else torch.minimum
        return combine(mask, super()._mask(layer_type, positions + self.change.newest, window_start, rows))


def with_softcap(drafter: Drafter, cap: float) -> Drafter:
    """The same drafter with a softcap on its logits, before the best token is chosen."""
    head = drafter.head
    if isinstance(head, DenseHead):
        linear = head.ops.linear
        ops = replace(head.ops, linear=lambda x, weight: torch.tanh(linear(x, weight) / cap) * cap)
        capped: nn.Module = _alike(head, DenseHead, ops=ops)
    else:
        capped = _alike(head, _CappedTwoStageHead, cap=cap)
    return _alike(drafter, Drafter, _modules={**drafter._modules, "head": capped})


class _CappedTwoStageHead(TwoStageHead):
    cap: float

    def _logits(self, hidden: Tensor, kept: Tensor) -> Tensor:
        return torch.tanh(super()._logits(hidden, kept) / self.cap) * self.cap


def _alike(module: nn.Module, kind: type[AnyModule], **changes: object) -> AnyModule:
    """A module of this class over the same weights, with some attributes changed."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__ | changes)
    return made
