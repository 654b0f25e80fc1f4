"""Hidden states of a drafter, as its head meets them: what clusters are fitted on and judged by."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exporter.checkpoint.names import drafter_weights, target_weights
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import Checkpoint
from exporter.graphs.spec import PREFILL_CHUNK
from exporter.modeling.config import DrafterConfig, TextConfig
from exporter.modeling.drafter import Drafter, kv_by_type
from exporter.modeling.target import Target, empty_kv
from exporter.modeling.weights import load_module
from exporter.parity.drafting import DRAFT_STEPS, FIRST_ROW, draft_rounds
from exporter.parity.reference import reference_ops
from runtime_ref.graph_engine import chunks

NUM_STATES = 8192
WIDENING = reference_ops(torch.float32)  # weights stay as they are stored, and are widened while they are used


def random_prompts(target: TextConfig) -> list[list[int]]:
    """Seeded random token ids: on the built-in pair centroids fitted on them are as good as on text."""
    shape = NUM_STATES // (DRAFT_STEPS * PREFILL_CHUNK), min(PREFILL_CHUNK, target.max_position_embeddings)
    return torch.randint(target.vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()


def prompt_passes(prompts: Sequence[Sequence[int]]) -> int:
    """Passes of the target that `drafting_states` takes."""
    return sum(1 for prompt in prompts for _ in chunks(prompt, PREFILL_CHUNK))


@torch.no_grad()
def drafting_states(pair: Pair, prompts: Sequence[Sequence[int]], progress: Callable[[], None]) -> Tensor:
    """States of draft steps after every token of the prompts, for a pair with a dense head.

    The target's weights stay in their file: a matrix is widened to float32 while it is used, so that a target of any
    size needs little memory.

    Args:
        prompts: token ids, each at most as long as the target's context.
        progress: called after each pass of the target, of at most `PREFILL_CHUNK` tokens.

    Returns:
        [tokens * DRAFT_STEPS, E] float32; the steps of one round lie together.
    """
    weights = target_weights(pair.target_checkpoint, pair.target, mapped=True)
    target = load_module(lambda: Target(pair.target, WIDENING), weights)
    readers = {**pair.drafter_weights, "target_embed_tokens.weight": lambda: target.embed_tokens.weight}
    drafter = load_module(lambda: Drafter(pair.drafter, None, WIDENING), readers)
    found = []
    for prompt in prompts:
        kv = empty_kv(pair.target, len(prompt))
        for start, chunk in chunks(prompt, PREFILL_CHUNK):
            tokens = torch.tensor(chunk)
            out = target(tokens, torch.tensor([start]), torch.arange(len(tokens)), kv)
            kv = out.kv
            shared = kv_by_type(kv, pair.shared_kv)
            positions = start + 1 + torch.arange(len(tokens))
            hidden, _ = draft_rounds(drafter, out.logits.argmax(-1), out.state, positions, shared)
            found.append(hidden.flatten(0, 1))
            progress()
    return torch.cat(found)


@torch.no_grad()
def lone_states(checkpoint: Checkpoint, config: DrafterConfig) -> Tensor:
    """States of first draft steps from random embeddings and states, over one cache row of zeros: no target is needed.

    Harder than real ones, because a real state says what comes next: with 8 of 64 clusters of the built-in pair 84 % of
    these keep their best token and 97 % of real ones. Centroids fitted on them are nearly as good.

    Returns:
        [NUM_STATES, E] float32.
    """
    generator, width = torch.Generator().manual_seed(0), config.backbone_hidden_size
    table = torch.randn(NUM_STATES, width, generator=generator) / width**0.5
    readers = drafter_weights(checkpoint, config, None, {"embed_tokens.weight": lambda: table})
    # The head is as large as all the rest, and no state depends on it.
    drafter = load_module(lambda: Drafter(config, None), {**readers, "head.weight": lambda: torch.empty(0)})
    text, kv = config.text, {}
    for kind in set(text.layer_types):
        sizes = text.attention(kind)
        kv[kind] = (torch.zeros(sizes.num_key_value_heads, 1, sizes.head_dim),) * 2
    found = []
    for tokens in torch.arange(NUM_STATES).split(1024):
        states = torch.randn(len(tokens), width, generator=generator)
        found.append(
            drafter.step(drafter.target_embed_tokens(tokens), states, torch.ones_like(tokens), FIRST_ROW, kv)[0]
        )
    return torch.cat(found)
