"""The table of known faults in how a drafter is fed, and draft steps in eager torch that have one of them.

To add a fault, add a line to `FAULTS`. If no field of `Change` expresses the fault, also add a field, and apply it in
`changed_step` or in `_ChangedDrafter`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from exporter.modeling.drafter import KV, Drafter
from exporter.modeling.two_stage import DenseHead, TwoStageHead
from exporter.modeling.weights import AnyModule
from exporter.parity.drafting import DraftStep


@dataclass(frozen=True)
class Change:
    """How a round differs from a correct one; by default it does not.

    Attributes:
        before_norm: the round starts from the target's state before its final norm; the caller passes those states.
        scaled: embedding rows are multiplied by sqrt(hidden size).
        position: added to the position that queries are rotated by, in every step.
        advance: added to that position once more with each step of a round.
        masks: the visible rows follow the changed position, as they do when a graph is given a wrong one.
        newest: 1 shows one row more, which no accepted token wrote; -1 hides the newest row.
        shift: number of rows by which the cache is displaced towards later positions.
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
        """Whether it reads rows after the round's position; in a finished text those contain the expected tokens."""
        return self.newest > 0 or self.shift < 0 or (self.masks and (self.position > 0 or self.advance > 0))


@dataclass(frozen=True)
class Fault:
    """A known fault.

    Attributes:
        experiment: the row of the doctor's table that it belongs to.
        label: what is wrong, as a clause that can follow "if".
        change: how a round in eager torch differs if it has the fault.
    """

    experiment: str
    label: str
    change: Change


STATE, ROWS, WINDOW = "state after the final norm", "KV rows", "sliding window"
FAULTS = (
    Fault(STATE, "the state comes before the target's final norm", Change(before_norm=True)),
    Fault("embedding scale", "embeddings are not multiplied by sqrt(hidden size)", Change(scaled=False)),
    Fault("position", "the position is 1 too low", Change(position=-1)),
    Fault("position", "the position is 1 too high", Change(position=1)),
    Fault("position", "position and rows in view are 1 too low", Change(position=-1, masks=True)),
    Fault("position", "position and rows in view are 1 too high", Change(position=1, masks=True)),
    Fault("position", "the position advances with each draft step", Change(advance=1)),
    Fault("position", "position and rows in view advance with each draft step", Change(advance=1, masks=True)),
    Fault(ROWS, "the newest row is not in view", Change(newest=-1)),
    Fault(ROWS, "a row that no accepted token wrote is in view", Change(newest=1)),
    Fault(ROWS, "rows lie 1 too far down", Change(shift=1)),
    Fault(ROWS, "rows lie 1 too far up", Change(shift=-1)),
    Fault(WINDOW, "the window is 1 shorter", Change(window=-1)),
    Fault(WINDOW, "the window is 1 longer", Change(window=1)),
)


def changed_step(change: Change) -> DraftStep:
    """Return `exporter.parity.drafting.draft_step` with a change; `before_norm` is left to the caller."""

    def step(
        drafter: Drafter, tokens: Tensor, states: Tensor, positions: Tensor, step: Tensor, window_start: Tensor, kv: KV
    ) -> tuple[Tensor, Tensor]:
        offsets = change.position + change.advance * step
        embedded = drafter.target_embed_tokens(tokens)
        if not change.scaled:
            embedded = embedded / drafter.target_embed_tokens.scale
        if change.shift:
            kv = {
                name: (_shifted(key, change.shift), _shifted(value, change.shift)) for name, (key, value) in kv.items()
            }
        text = drafter.config.text
        text = replace(text, sliding_window=text.sliding_window + change.window)
        config = replace(drafter.config, text=text)
        changed = _variant(drafter, _ChangedDrafter, config=config, change=change, offsets=offsets)
        return changed.step(embedded, states, positions + offsets, window_start, kv)

    return step


def with_softcap(drafter: Drafter, cap: float) -> Drafter:
    """Return a drafter over the same weights that softcaps its logits before it chooses the best token.

    Args:
        drafter: a drafter in eager torch, with a dense or a two-stage head.
        cap: limit of the logits, which become tanh(logits / cap) * cap.
    """
    head = drafter.head
    if isinstance(head, DenseHead):
        linear = head.ops.linear
        ops = replace(head.ops, linear=lambda x, weight: torch.tanh(linear(x, weight) / cap) * cap)
        capped: nn.Module = _variant(head, DenseHead, ops=ops)
    else:
        capped = _variant(head, _CappedTwoStageHead, cap=cap)
    return _variant(drafter, Drafter, _modules={**drafter._modules, "head": capped})


class _ChangedDrafter(Drafter):
    """A drafter whose given positions [rounds] are wrong by `offsets` [rounds] int64."""

    change: Change
    offsets: Tensor

    def _mask(self, layer_type: str, positions: Tensor, window_start: Tensor, rows: int) -> Tensor:
        if not self.change.masks:
            positions = positions - self.offsets
        mask = super()._mask(layer_type, positions, window_start, rows)
        if not self.change.newest:
            return mask
        # One row more is visible if either mask shows it, one less if both must; the window's far end does not move.
        combine = torch.maximum if self.change.newest > 0 else torch.minimum
        return combine(mask, super()._mask(layer_type, positions + self.change.newest, window_start, rows))


class _CappedTwoStageHead(TwoStageHead):
    cap: float

    def _logits(self, hidden: Tensor, kept: Tensor) -> Tensor:
        return torch.tanh(super()._logits(hidden, kept) / self.cap) * self.cap


def _shifted(rows: Tensor, shift: int) -> Tensor:
    """Shift a cache's rows; the row at the edge is repeated, as when rows are copied within a buffer."""
    count = rows.shape[1]
    return rows[:, (torch.arange(count) - shift).clamp(0, count - 1)]


def _variant(module: nn.Module, cls: type[AnyModule], **changes: object) -> AnyModule:
    """Return a module of another class over the same weights, with some attributes changed."""
    made = cls.__new__(cls)
    made.__dict__.update(module.__dict__ | changes)
    return made
