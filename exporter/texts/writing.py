"""Let a target write texts, for checkpoints that have no tokenizer: what it writes is what it will be run on."""

import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.checkpoint.stored_target import open_target, stored_ops
from exporter.modeling.target import empty_kv
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

NUM_TEXTS, TEXT_TOKENS = 64, 64


@torch.no_grad()
def write_texts(
    pair: Pair,
    seed: int = 0,
    num_texts: int = NUM_TEXTS,
    text_tokens: int = TEXT_TOKENS,
    progress: Progress = lambda *_: None,
) -> list[list[int]]:
    """Sample texts from the beginning-of-text token on, at temperature 1.

    Weights stay in the dtype of their file, and all texts grow together, so that each is read once for a token of all.

    Args:
        pair: the pair whose target writes.
        seed: seed of the samples.
        num_texts: how many texts to write.
        text_tokens: tokens of each text, the beginning-of-text token among them.
        progress: called after each token of all texts, with 1.

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
    length, target = min(text_tokens, pair.target.max_position_embeddings), open_target(pair, stored_ops())

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
        progress(f"token {position + 2} of {length}", 1)
    return texts.tolist()
