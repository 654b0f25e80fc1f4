"""Collect a drafter's hidden states, the inputs of its head: clusters are fitted and tested on them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exporter.checkpoint.names import drafter_weights
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.stored_target import Weight, load_stored, open_target, stored_ops
from exporter.checkpoint.tensors import Checkpoint
from exporter.graphs.spec import PREFILL_CHUNK_TOKENS
from exporter.modeling.config import DrafterConfig
from exporter.modeling.drafter import Drafter, kv_by_type
from exporter.modeling.target import empty_kv
from exporter.modeling.weights import load_module
from exporter.parity.drafting import FIRST_ROW, draft_rounds
from runtime_ref.graph_engine import chunks

NUM_STATES = 8192  # without a target
TARGET_ROWS = "target_embed_tokens.weight"  # of the drafter


def prompt_passes(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many passes of the target `drafting_states` runs for these prompts of token ids."""
    return sum(1 for prompt in prompts for _ in chunks(prompt, PREFILL_CHUNK_TOKENS))


@torch.no_grad()
def drafting_states(pair: Pair, prompts: Sequence[Sequence[int]], progress: Callable[[], None]) -> Tensor:
    """Draft after every token of the prompts and return the drafter's states.

    The target's weights stay in their file, and a matrix is widened to float32 while it is used: a target of any size
    needs little memory.

    Args:
        pair: a pair with a dense head.
        prompts: token ids, each prompt at most as long as the target's context.
        progress: called after each pass of the target, of at most `PREFILL_CHUNK_TOKENS` tokens.

    Returns:
        [tokens * DRAFT_STEPS, E] float32, in the order of the tokens, then of the steps of a round.
    """
    # Weights stay in the dtype of their file until they are used.
    target = open_target(pair, ops := stored_ops())
    weights: dict[str, Weight] = {name: read() for name, read in pair.drafter_weights.items() if name != TARGET_ROWS}
    weights[TARGET_ROWS] = target.embed_tokens.weight
    drafter = load_stored(lambda: Drafter(pair.drafter, None, ops), weights)
    states = []
    for prompt in prompts:
        kv = empty_kv(pair.target, len(prompt))
        for start, chunk in chunks(prompt, PREFILL_CHUNK_TOKENS):
            tokens = torch.tensor(chunk)
            out = target(tokens, torch.tensor([start]), torch.arange(len(tokens)), kv)
            kv = out.kv
            shared = kv_by_type(kv, pair.shared_kv)
            positions = start + 1 + torch.arange(len(tokens))
            hidden, _ = draft_rounds(drafter, out.logits.argmax(-1), out.state, positions, shared)
            states.append(hidden.flatten(0, 1))
            progress()
    return torch.cat(states)


@torch.no_grad()
def states_without_target(checkpoint: Checkpoint, config: DrafterConfig) -> Tensor:
    """Return a drafter's states after first draft steps on random embeddings and states, over one cache row of zeros.

    Recall is lower on them than on states of real drafting, where the target's state predicts the next token: with 8 of
    64 clusters of the built-in pair it is 84 % and 97 %. Centroids fitted on them are nearly as good.

    Args:
        checkpoint: the drafter's weights.
        config: the drafter's config.

    Returns:
        [NUM_STATES, E] float32.
    """
    generator, size = torch.Generator().manual_seed(0), config.backbone_hidden_size
    table = torch.randn(NUM_STATES, size, generator=generator) / size**0.5
    readers = drafter_weights(checkpoint, config, None, {"embed_tokens.weight": lambda: table})
    # No state depends on the head, which is as large as all other weights together.
    drafter = load_module(lambda: Drafter(config, None), {**readers, "head.weight": lambda: torch.empty(0)})
    text, kv = config.text, {}
    for layer_type in set(text.layer_types):
        sizes = text.attention(layer_type)
        kv[layer_type] = (torch.zeros(sizes.num_key_value_heads, 1, sizes.head_dim),) * 2
    hidden = []
    for tokens in torch.arange(NUM_STATES).split(1024):
        states = torch.randn(len(tokens), size, generator=generator)
        embedded = drafter.target_embed_tokens(tokens)
        hidden.append(drafter.step(embedded, states, torch.ones_like(tokens), FIRST_ROW, kv)[0])
    return torch.cat(hidden)
