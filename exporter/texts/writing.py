"""Let a target write texts, for checkpoints that have no tokenizer: what it writes is what it will be run on."""

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.modeling.layers import Ops, rms_norm
from exporter.modeling.target import Target, empty_kv
from exporter.modeling.weights import load_module
from runtime_ref.errors import InputError

NUM_TEXTS, TEXT_TOKENS = 64, 64
_BLOCK_ROWS = 1024  # of a matrix that are widened to float32 at a time; they stay in the processor's cache


@torch.no_grad()
def write_texts(
    pair: Pair, seed: int = 0, num_texts: int = NUM_TEXTS, text_tokens: int = TEXT_TOKENS
) -> list[list[int]]:
    """Sample texts from the beginning-of-text token on, at temperature 1.

    Weights stay in the dtype of their file, and all texts grow together, so that each is read once for a token of all.

    Args:
        pair: the pair whose target writes.
        seed: seed of the samples.
        num_texts: how many texts to write.
        text_tokens: tokens of each text, the beginning-of-text token among them.

    Returns:
        Token ids of each text, fewer than `text_tokens` if the target has fewer positions.

    Raises:
        InputError: the beginning-of-text token is not in the vocabulary, or the logits are not finite.
    """
    directory, bos = pair.target_checkpoint.directory, pair.tokens.bos
    if bos >= pair.target.vocab_size:
        raise InputError(
            f"{directory}: cannot write texts to fit weights or clusters on: bos_token_id is {bos}, expected less than"
            f" the {pair.target.vocab_size} tokens of the target; correct it in generation_config.json or config.json,"
            " or pass texts as JSON with --calibration (`export`) or --text (`cluster`)"
        )
    generator = torch.Generator().manual_seed(seed)
    ops = Ops(
        linear=lambda x, weight: torch.cat([x @ rows.float().T for rows in weight.split(_BLOCK_ROWS)], -1),
        embedding=lambda ids, table: table[ids].float(),
        rms_norm=lambda x, weight, eps: rms_norm(x, None if weight is None else weight.float(), eps),
    )
    suppresses, length = bool(pair.tokens.suppressed), min(text_tokens, pair.target.max_position_embeddings)
    target = load_module(lambda: Target(pair.target, ops, suppresses), pair.mapped_target_weights)

    def step(token: Tensor, position: Tensor, kv: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out = target(token, position, torch.zeros(1, dtype=torch.int64), kv)
        return out.logits[0], out.kv

    # The model definition takes one sequence, so it is mapped over the texts.
    batched = torch.vmap(step, in_dims=(0, None, 0))
    kv = [part.expand(num_texts, *part.shape).clone() for part in empty_kv(pair.target, length)]
    texts = torch.full((num_texts, 1), bos)
    for position in range(length - 1):
        logits, kv = batched(texts[:, -1:], torch.tensor([position]), kv)
        if not logits.isfinite().all():
            raise InputError(f"{directory}: the target's logits are NaN or infinity; restore the checkpoint")
        chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        texts = torch.cat((texts, chosen), 1)
    return texts.tolist()
