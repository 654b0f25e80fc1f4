"""Training loops and losses that `train` and `qat` share. They run the model definition that is exported.

Shapes: B sequences of a batch, T tokens, E hidden size, V vocabulary, C clusters.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from exporter.demo.training.bpe import SPECIAL, VOCAB
from exporter.modeling.config import shared_kv
from exporter.modeling.drafter import Drafter, kv_by_type
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target, TargetOutput, empty_kv
from exporter.modeling.two_stage import DenseHead

SEQUENCE_TOKENS = 256
TARGET_BATCH_SEQUENCES, DRAFTER_BATCH_SEQUENCES = 16, 8
DRAFT_STEPS = 4

# Gets a module, and replaces its weights by others while a block runs.
SwappedWeights = Callable[[nn.Module], AbstractContextManager[object]]

# Weights stay in float32. On a CPU with bfloat16 instructions, training takes about two thirds of the time with them.
BFLOAT16 = Ops(linear=lambda x, weight: F.linear(x.bfloat16(), weight.bfloat16()).float())


@torch.no_grad()
def write_texts(target: Target, tokens: Tensor, count: int = 1024, seed: int = 0) -> Tensor:
    """Let the target generate texts greedily, for a drafter to learn from.

    Each text begins with the first tokens of a random document. When a document ends, the text goes on with the
    beginning of another one.

    Args:
        target: the target.
        tokens: [T] int64, the training documents, each between <bos> and <eos>.
        count: number of texts.
        seed: seed of the choice of documents.

    Returns:
        Token ids [count, SEQUENCE_TOKENS] int64.
    """
    generator = random.Random(seed)
    starts = (tokens == SPECIAL.index("<bos>")).nonzero().flatten().tolist()

    def opening() -> list[int]:
        start = generator.choice(starts)
        return tokens[start : start + generator.randint(3, 16)].tolist()

    def step(token: Tensor, position: Tensor, kv: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out = target(token, position, torch.zeros(1, dtype=torch.int64), kv)
        return out.logits[0].argmax(), out.kv

    batched = torch.vmap(step, in_dims=(0, None, 0))
    kv = [part.expand(count, *part.shape).clone() for part in empty_kv(target.config, SEQUENCE_TOKENS)]
    openings = [opening() for _ in range(count)]
    texts = [[given.pop(0)] for given in openings]
    for position in track(range(SEQUENCE_TOKENS - 1), description="texts"):
        best, kv = batched(torch.tensor([text[-1:] for text in texts]), torch.tensor([position]), kv)
        for text, given, choice in zip(texts, openings, best.tolist(), strict=True):
            if text[-1] == SPECIAL.index("<eos>") and not given:
                given.extend(opening())
            text.append(given.pop(0) if given else choice)
    return torch.tensor(texts)


def train_drafter(
    drafter: Drafter,
    target: Target,
    sequences: Iterator[Tensor],
    steps: int,
    rate: float,
    sharpness: float,
    weights: SwappedWeights = nullcontext,
) -> None:
    """Train a drafter to match the target's distribution in `DRAFT_STEPS` draft steps from every position at once.

    Args:
        drafter: a drafter with a dense head, trained in place.
        target: the target that it drafts for, which stays as it is.
        sequences: endless batches of token ids, each [B, T] int64.
        steps: number of training steps.
        rate: maximum learning rate.
        sharpness: factor of the target's logits. Above 1 it puts more weight on the target's best token, as greedy
            decoding needs.
        weights: replaces the drafter's weights while loss and gradients are computed.
    """

    def loss(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden, logits in _draft_steps(drafter, target, batch):
            expected = (sharpness * logits).softmax(-1)
            actual = F.linear(hidden, dense_head(drafter).weight)
            total = total + F.cross_entropy(actual.flatten(0, 1), expected.flatten(0, 1))
        return total / DRAFT_STEPS

    optimise("drafter", drafter, loss, sequences, steps, rate, weights)


def train_centroids(drafter: Drafter, target: Target, tokens: Tensor, ordering: Tensor, steps: int = 200) -> Tensor:
    """Train centroids to choose the cluster that holds the drafter's own best token.

    Args:
        drafter: a trained drafter with a dense head.
        target: the target that it drafts for.
        tokens: [T] int64, training text.
        ordering: [C, M] int64, the token ids of each cluster.
        steps: number of training steps.

    Returns:
        Centroids [C, E] float32.
    """
    cluster_of = torch.empty(VOCAB, dtype=torch.int64)
    cluster_of[ordering] = torch.arange(len(ordering))[:, None]
    scorer = nn.Linear(drafter.config.text.hidden_size, len(ordering), bias=False)
    scorer.weight.data = dense_head(drafter).weight.data[ordering].mean(1)

    def loss(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden, _ in _draft_steps(drafter, target, batch):
            hidden = hidden.detach()
            expected = cluster_of[F.linear(hidden, dense_head(drafter).weight).argmax(-1)]
            total = total + F.cross_entropy(scorer(hidden).flatten(0, 1), expected.flatten())
        return total / DRAFT_STEPS

    optimise("centroids", scorer, loss, batches(tokens, DRAFTER_BATCH_SEQUENCES, SEQUENCE_TOKENS), steps, 1e-2)
    return scorer.weight.detach()


def run_target(target: Target, batch: Tensor) -> TargetOutput:
    """Run whole sequences from position 0.

    The model definition takes one sequence, so it is mapped over the batch.

    Args:
        target: the target.
        batch: token ids [B, T] int64.

    Returns:
        The target's output for all positions: logits [B, T, V], states [B, T, E], and K and V of each storing layer,
        all float32 and with a first dimension B.
    """
    length = batch.shape[1]

    def run(tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = target(tokens, torch.zeros(1, dtype=torch.int64), torch.arange(length), empty_kv(target.config, length))
        return out.logits, out.state, out.kv

    return TargetOutput(*torch.vmap(run)(batch))


def _draft_steps(drafter: Drafter, target: Target, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each draft step, hidden states [B, positions, E] and the target's logits [B, positions, V] for them.

    A round starts at each position p from 1 to T - `DRAFT_STEPS`. Its step i, counted from 0, reads token p + i and is
    compared with the target's logits after that token.
    """
    with torch.no_grad():
        out = run_target(target, batch)
    kv = kv_by_type(out.kv, shared_kv(target.config, drafter.config))
    positions = torch.arange(1, batch.shape[1] - DRAFT_STEPS + 1)
    states = out.state[:, : len(positions)]
    for i in range(DRAFT_STEPS):
        read = batch[:, 1 + i : 1 + i + len(positions)]
        step = torch.vmap(
            lambda t, s, kv: drafter.step(drafter.target_embed_tokens(t), s, positions, positions[:1] * 0, kv)
        )
        hidden, states = step(read, states, kv)
        yield hidden, out.logits[:, 1 + i : 1 + i + len(positions)]


def optimise(
    name: str,
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    sequences: Iterator[Tensor],
    steps: int,
    rate: float,
    weights: SwappedWeights = nullcontext,
) -> None:
    """Train a model with AdamW, a short warm-up and a cosine schedule.

    Args:
        name: name of the model in what is printed.
        model: the model, trained in place.
        loss: returns the loss of a batch.
        sequences: endless batches of token ids, each [B, T] int64.
        steps: number of training steps.
        rate: maximum learning rate.
        weights: replaces the model's weights while loss and gradients are computed; the gradients are applied to the
            weights that were replaced.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 25)
    for step in track(range(steps), description=name):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = rate * min((step + 1) / warmup, max(cosine, 0.02))
        optimiser.zero_grad()
        with weights(model):
            value = loss(next(sequences))
            value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 50 == 0:
            print(f"{name} step {step}: loss {value.item():.3f}", flush=True)


def initialise(model: nn.Module, keep: Tensor | None = None) -> None:
    """Set all matrices of a model to normally distributed values, except the parameter `keep`."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter is not keep:
            nn.init.normal_(parameter, std=min(0.05, parameter.shape[1] ** -0.5))


def batches(tokens: Tensor, size: int, length: int) -> Iterator[Tensor]:
    """Yield batches of sequences from random places of a text, without end; always the same ones.

    Args:
        tokens: [T] int64, the text.
        size: sequences of a batch, B.
        length: tokens of a sequence.

    Yields:
        Token ids [B, length] int64.
    """
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def shuffled(texts: Tensor) -> Iterator[Tensor]:
    """Yield batches of randomly chosen texts, without end; always the same ones.

    Args:
        texts: token ids [texts, T] int64.

    Yields:
        Token ids [DRAFTER_BATCH_SEQUENCES, T] int64.
    """
    generator = torch.Generator().manual_seed(2)
    while True:
        yield texts[torch.randint(len(texts), (DRAFTER_BATCH_SEQUENCES,), generator=generator)]


@torch.no_grad()
def held_out_loss(target: Target, tokens: Tensor) -> float:
    """Return the mean cross-entropy of a target, in nats for each token, on a text [T] int64."""
    rows = tokens[: len(tokens) // (SEQUENCE_TOKENS + 1) * (SEQUENCE_TOKENS + 1)].reshape(-1, SEQUENCE_TOKENS + 1)
    out = run_target(target, rows[:, :-1])
    return F.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def dense_head(drafter: Drafter) -> DenseHead:
    """Return the head of a drafter in training, which is dense."""
    return cast(DenseHead, drafter.head)
