"""Draft rounds in eager torch, run for many positions of one text in a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from exporter.modeling.drafter import KV, Drafter

DRAFT_STEPS = 4  # draft tokens in a round
FIRST_ROW = torch.zeros(1, dtype=torch.int64)  # `window_start` of a cache that holds the whole text

# `draft_step`, or a variant of it with the same arguments and results.
DraftStep = Callable[[Drafter, Tensor, Tensor, Tensor, Tensor, Tensor, KV], tuple[Tensor, Tensor]]


def draft_step(
    drafter: Drafter, tokens: Tensor, states: Tensor, positions: Tensor, step: Tensor, window_start: Tensor, kv: KV
) -> tuple[Tensor, Tensor]:
    """Run one draft step of many rounds.

    Args:
        drafter: the drafter in eager torch.
        tokens: [rounds] int64, first the token that each round drafts after, later the previous draft token.
        states: [rounds, E_target] float32, first the target's state that chose that token, later the state that the
            previous step returned.
        positions: [rounds] int64, the position of the token that each round drafts after, in every step.
        step: [] or [rounds] int64, index of the step in its round. This function ignores it; variants may use it.
        window_start: [1] int64, the position that row 0 of the sliding layers' K and V holds.
        kv: K and V [N, S, D] float32 by layer type; rows from `positions` on are masked.

    Returns:
        Hidden states [rounds, E] float32, and next states [rounds, E_target] float32.
    """
    return drafter.step(drafter.target_embed_tokens(tokens), states, positions, window_start, kv)


def draft_rounds(
    drafter: Drafter, tokens: Tensor, states: Tensor, positions: Tensor, kv: KV, step: DraftStep = draft_step
) -> tuple[Tensor, Tensor]:
    """Run many rounds of `DRAFT_STEPS` draft steps over one text, each round at its own position.

    Args:
        drafter: the drafter in eager torch.
        tokens: [rounds] int64, the token that each round drafts after.
        states: [rounds, E_target] float32, the target's state that chose that token.
        positions: [rounds] int64, the position of that token.
        kv: K and V [N, S, D] float32 of the whole text, by layer type; rows from a round's position on are masked.
        step: runs one step of all rounds.

    Returns:
        Hidden states [rounds, DRAFT_STEPS, E] float32 and draft tokens [rounds, DRAFT_STEPS] int64.
    """
    hiddens, drafts = [], []
    for number in range(DRAFT_STEPS):
        hidden, states = step(drafter, tokens, states, positions, torch.tensor(number), FIRST_ROW, kv)
        tokens = drafter.head(hidden)
        hiddens.append(hidden)
        drafts.append(tokens)
    return torch.stack(hiddens, 1), torch.stack(drafts, 1)
