"""Many draft rounds of one text in one batch, in eager torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from exporter.modeling.drafter import KV, Drafter

DRAFT_STEPS = 4  # of each round
FIRST_ROW = torch.zeros(1, dtype=torch.int64)  # `window_start` of a cache that holds the whole text

# `draft_step`, or a variant of it with the same arguments and results.
DraftStep = Callable[[Drafter, Tensor, Tensor, Tensor, Tensor, Tensor, KV], tuple[Tensor, Tensor]]


def draft_step(
    drafter: Drafter, tokens: Tensor, states: Tensor, positions: Tensor, step: Tensor, window_start: Tensor, kv: KV
) -> tuple[Tensor, Tensor]:
    """Run one draft step of T rounds.

    Args:
        drafter: in eager torch.
        tokens: [T] int64, `last` of each round, or the draft token before.
        states: [T, E_target] float32, the target's state before `last`, or the state that the step before returned.
        positions: [T] int64, the position of each round's `last`.
        step: [] or [T] int64, which step of its round this is; the drafter does not depend on it, variants may.
        window_start: [1] int64, the position that row 0 of sliding layers' K and V holds.
        kv: K and V [N, S, D] float32 by layer type; rows from `positions` on are masked.

    Returns:
        Hidden states [T, E] float32, and next states [T, E_target] float32.
    """
    return drafter.step(drafter.target_embed_tokens(tokens), states, positions, window_start, kv)


def draft_rounds(
    drafter: Drafter, tokens: Tensor, states: Tensor, positions: Tensor, kv: KV, step: DraftStep = draft_step
) -> tuple[Tensor, Tensor]:
    """Run the `DRAFT_STEPS` draft steps of T rounds over one text, each round at a position of its own.

    Args:
        drafter: in eager torch.
        tokens: [T] int64, `last` of each round.
        states: [T, E_target] float32, the target's state before `last`.
        positions: [T] int64, the position of `last`.
        kv: K and V [N, S, D] float32 of the whole text, by layer type; rows that a round may not see are masked.
        step: runs one step.

    Returns:
        Hidden states [T, DRAFT_STEPS, E] float32 and draft tokens [T, DRAFT_STEPS] int64.
    """
    hiddens, drafts = [], []
    for number in range(DRAFT_STEPS):
        hidden, states = step(drafter, tokens, states, positions, torch.tensor(number), FIRST_ROW, kv)
        tokens = drafter.head(hidden)
        hiddens.append(hidden)
        drafts.append(tokens)
    return torch.stack(hiddens, 1), torch.stack(drafts, 1)
