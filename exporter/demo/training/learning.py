"""Training loops and losses that `train` and `qat` share; both run the model definition that is exported."""

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

SEQUENCE_TOKENS, DRAFT_STEPS = 256, 4


TARGET_BATCH_SEQUENCES, DRAFTER_BATCH_SEQUENCES = 16, 8


# Puts other weights in a module's place while the block runs.
SwappedWeights = Callable[[nn.Module], AbstractContextManager[object]]


# Weights stay in float32; products of bfloat16 train in about two thirds of the time on a CPU that has them.
BFLOAT16 = Ops(linear=lambda x, weight: F.linear(x.bfloat16(), weight.bfloat16()).float())


@torch.no_grad()
def write_texts(target: Target, tokens: Tensor, count: int = 1024, seed: int = 0) -> Tensor:
    """Greedy texts [count, SEQUENCE_TOKENS] of the target, given a document's first words whenever one ends."""
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
    texts = [[words.pop(0)] for words in openings]
    for position in track(range(SEQUENCE_TOKENS - 1), description="texts"):
        best, kv = batched(torch.tensor([text[-1:] for text in texts]), torch.tensor([position]), kv)
        for text, words, choice in zip(texts, openings, best.tolist(), strict=True):
            if text[-1] == SPECIAL.index("<eos>") and not words:
                words.extend(opening())
            text.append(words.pop(0) if words else choice)
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
    """Match the target's distribution over `DRAFT_STEPS` draft steps from every position of a sequence at once.

    A sharpness above 1 puts more weight on the target's first choice, which is what greedy decoding asks for.
    """

    def loss(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden, logits in _draft_steps(drafter, target, batch):
            wanted = (sharpness * logits).softmax(-1)
            found = F.linear(hidden, dense_head(drafter).weight)
            total = total + F.cross_entropy(found.flatten(0, 1), wanted.flatten(0, 1))
        return total / DRAFT_STEPS

    optimise("drafter", drafter, loss, sequences, steps, rate, weights)


def train_centroids(drafter: Drafter, target: Target, tokens: Tensor, ordering: Tensor, steps: int = 200) -> Tensor:
    """Centroids [C, E] that pick the cluster of the drafter's own best token."""
    cluster_of = torch.empty(VOCAB, dtype=torch.int64)
    cluster_of[ordering] = torch.arange(len(ordering))[:, None]
    scorer = nn.Linear(drafter.config.text.hidden_size, len(ordering), bias=False)
    scorer.weight.data = dense_head(drafter).weight.data[ordering].mean(1)

    def loss(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden, _ in _draft_steps(drafter, target, batch):
            hidden = hidden.detach()
            wanted = cluster_of[F.linear(hidden, dense_head(drafter).weight).argmax(-1)]
            total = total + F.cross_entropy(scorer(hidden).flatten(0, 1), wanted.flatten())
        return total / DRAFT_STEPS

    optimise("centroids", scorer, loss, batches(tokens, DRAFTER_BATCH_SEQUENCES, SEQUENCE_TOKENS), steps, 1e-2)
    return scorer.weight.detach()


def run_target(target: Target, batch: Tensor) -> TargetOutput:
    """Run sequences [B, T] from position 0, one row of the batch a call of the model definition."""
    length = batch.shape[1]

    def run(tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = target(tokens, torch.zeros(1, dtype=torch.int64), torch.arange(length), empty_kv(target.config, length))
        return out.logits, out.state, out.kv

    return TargetOutput(*torch.vmap(run)(batch))


def _draft_steps(drafter: Drafter, target: Target, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states of each draft step, and the target's logits that they should match, each [B, T, *].

    Step i of the round that starts at p reads token p+i and is to say what the target says after it.
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
    """AdamW with a cosine; loss and gradients are those within `weights(model)`, which may put others in place."""
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
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter is not keep:
            nn.init.normal_(parameter, std=min(0.05, parameter.shape[1] ** -0.5))


def batches(tokens: Tensor, size: int, length: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def shuffled(texts: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield texts[torch.randint(len(texts), (DRAFTER_BATCH_SEQUENCES,), generator=generator)]


@torch.no_grad()
def held_out_loss(target: Target, tokens: Tensor) -> float:
    rows = tokens[: len(tokens) // (SEQUENCE_TOKENS + 1) * (SEQUENCE_TOKENS + 1)].reshape(-1, SEQUENCE_TOKENS + 1)
    out = run_target(target, rows[:, :-1])
    return F.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def dense_head(drafter: Drafter) -> DenseHead:
    return cast(DenseHead, drafter.head)
