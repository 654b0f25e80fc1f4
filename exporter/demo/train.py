"""Train the built-in pair: `python -m exporter.demo.train --output DIR` (one to two hours on one core).

A small Gemma 4 E2B-shaped target learns Python's documentation; its drafter then learns the target. Both run the same
model definition that is exported, mapped over a batch. Checkpoints are written in the published dialect, in bfloat16.
The drafter first learns on the documents, then on what the target itself writes, which is what it will draft. What is
already in DIR is kept: a target as it is, a drafter as the start of the second phase.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import click
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clustering.kmeans import equal_clusters
from exporter.bench.acceptance import measure
from exporter.config import read_drafter_config, read_target_config
from exporter.demo.corpus import documents
from exporter.demo.tokenizer import SPECIAL, VOCAB, pack, train_tokenizer
from exporter.modeling.drafter import Drafter
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target, TargetOutput, empty_kv
from exporter.modeling.two_stage import DenseHead
from exporter.pair import open_pair

SEQUENCE, DRAFT_STEPS = 256, 4
TARGET_BATCH, DRAFTER_BATCH = 16, 8
TARGET_PREFIX = "model.language_model."

Weights = Callable[[nn.Module], AbstractContextManager[object]]

# Weights stay in float32; products of bfloat16 train in about two thirds of the time on a CPU that has them.
BFLOAT16 = Ops(linear=lambda x, weight: F.linear(x.bfloat16(), weight.bfloat16()).float())

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
_TEXT = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": _ROPE,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "dtype": "bfloat16",
}
TARGET = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "text_config": _TEXT
    | {
        "hidden_size": 192,
        "intermediate_size": 352,
        "num_hidden_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 30.0,
    },
}
DRAFTER = {
    "architectures": ["Gemma4AssistantForCausalLM"],
    "model_type": "gemma4_assistant",
    "tie_word_embeddings": True,
    "backbone_hidden_size": 192,
    "use_ordered_embeddings": True,
    "num_centroids": 64,
    "centroid_intermediate_top_k": 8,
    "text_config": _TEXT
    | {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "final_logit_softcapping": None,
    },
}


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--target-steps", default=1400, show_default=True)
@click.option("--drafter-steps", default=650, show_default=True, help="On the documents.")
@click.option("--own-text-steps", default=650, show_default=True, help="On text that the target wrote.")
@click.option("--threads", default=1, show_default=True)
def main(output: Path, target_steps: int, drafter_steps: int, own_text_steps: int, threads: int) -> None:
    """Train target, drafter and clusters, and print what they reach on held-out text."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    training, held_out = documents()
    tokenizer = train_tokenizer(training)
    for name, config in (("target", TARGET), ("drafter", DRAFTER)):
        (output / name).mkdir(parents=True, exist_ok=True)
        (output / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(output / "target" / "tokenizer.json"))
    (output / "target" / "generation_config.json").write_text('{"bos_token_id": 2, "eos_token_id": [1]}\n')

    tokens, unseen = (pack(tokenizer, texts) for texts in (training, held_out))
    started = time.time()
    if (output / "target" / "model.safetensors").exists():
        target = load_target(output / "target", BFLOAT16)
    else:
        target = Target(read_target_config(output / "target"), BFLOAT16)
        train_target(target, tokens, target_steps)
        round_to_bfloat16(target)
        save_target(target, output / "target")
    print(f"target: {time.time() - started:.0f} s, held-out loss {held_out_loss(target, unseen):.3f} nats a token")

    started = time.time()
    drafter = new_drafter(output / "drafter", target, BFLOAT16)
    if (output / "drafter" / "model.safetensors").exists():
        load_drafter(drafter, output / "drafter")
    else:
        train_drafter(drafter, target, batches(tokens, DRAFTER_BATCH, SEQUENCE), drafter_steps, 3e-3, 1.0)
    train_drafter(drafter, target, shuffled(write_texts(target, tokens)), own_text_steps, 1.5e-3, 2.0)
    save_drafter(drafter, target, tokens, output / "drafter")
    print(f"drafter: {time.time() - started:.0f} s")
    print_acceptance(output, held_out)


def train_target(target: Target, tokens: Tensor, steps: int) -> None:
    """Next-token prediction."""
    _initialise(target)

    def loss(batch: Tensor) -> Tensor:
        out = run_target(target, batch[:, :-1])
        return F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())

    optimise("target", target, loss, batches(tokens, TARGET_BATCH, SEQUENCE + 1), steps, 3e-3)


@torch.no_grad()
def write_texts(target: Target, tokens: Tensor, count: int = 1024, seed: int = 0) -> Tensor:
    """Greedy texts [count, SEQUENCE] of the target, given a document's first words whenever one ends."""
    generator = random.Random(seed)
    starts = (tokens == SPECIAL.index("<bos>")).nonzero().flatten().tolist()

    def opening() -> list[int]:
        start = generator.choice(starts)
        return tokens[start : start + generator.randint(3, 16)].tolist()

    def step(token: Tensor, position: Tensor, kv: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out = target(token, position, torch.zeros(1, dtype=torch.int64), kv)
        return out.logits[0].argmax(), out.kv

    batched = torch.vmap(step, in_dims=(0, None, 0))
    kv = [part.expand(count, *part.shape).clone() for part in empty_kv(target.config, SEQUENCE)]
    openings = [opening() for _ in range(count)]
    texts = [[words.pop(0)] for words in openings]
    for position in track(range(SEQUENCE - 1), description="texts"):
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
    weights: Weights = nullcontext,
) -> None:
    """Match the target's distribution over `DRAFT_STEPS` draft steps from every position of a sequence at once.

    A sharpness above 1 puts more weight on the target's first choice, which is what greedy decoding asks for.
    """

    def loss(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden, logits in _draft_steps(drafter, target, batch):
            wanted = (sharpness * logits).softmax(-1)
            found = F.linear(hidden, _dense(drafter).weight)
            total = total + F.cross_entropy(found.flatten(0, 1), wanted.flatten(0, 1))
        return total / DRAFT_STEPS

    optimise("drafter", drafter, loss, sequences, steps, rate, weights)


def train_centroids(drafter: Drafter, target: Target, tokens: Tensor, ordering: Tensor, steps: int = 200) -> Tensor:
    """Centroids [C, E] that pick the cluster of the drafter's own best token."""
    cluster_of = torch.empty(VOCAB, dtype=torch.int64)
    cluster_of[ordering] = torch.arange(len(ordering))[:, None]
    scorer = nn.Linear(drafter.config.text.hidden_size, len(ordering), bias=False)
    scorer.weight.data = _dense(drafter).weight.data[ordering].mean(1)

    def loss(batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for hidden, _ in _draft_steps(drafter, target, batch):
            hidden = hidden.detach()
            wanted = cluster_of[F.linear(hidden, _dense(drafter).weight).argmax(-1)]
            total = total + F.cross_entropy(scorer(hidden).flatten(0, 1), wanted.flatten())
        return total / DRAFT_STEPS

    optimise("centroids", scorer, loss, batches(tokens, DRAFTER_BATCH, SEQUENCE), steps, 1e-2)
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
    sources = {kind: target.config.kv_source(kind) for kind in set(drafter.config.text.layer_types)}
    kv = {kind: (out.kv[2 * i].detach(), out.kv[2 * i + 1].detach()) for kind, i in sources.items()}
    positions = torch.arange(1, batch.shape[1] - DRAFT_STEPS + 1)
    states = out.state[:, : len(positions)].detach()
    for i in range(DRAFT_STEPS):
        read = batch[:, 1 + i : 1 + i + len(positions)]
        step = torch.vmap(
            lambda t, s, kv: drafter.step(drafter.target_embed_tokens(t), s, positions, positions[:1] * 0, kv)
        )
        hidden, states = step(read, states, kv)
        yield hidden, out.logits[:, 1 + i : 1 + i + len(positions)].detach()


def optimise(
    name: str,
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    sequences: Iterator[Tensor],
    steps: int,
    rate: float,
    weights: Weights = nullcontext,
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


def _initialise(model: nn.Module, keep: Tensor | None = None) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter is not keep:
            nn.init.normal_(parameter, std=min(0.05, parameter.shape[1] ** -0.5))


def round_to_bfloat16(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def batches(tokens: Tensor, size: int, length: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def shuffled(texts: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield texts[torch.randint(len(texts), (DRAFTER_BATCH,), generator=generator)]


@torch.no_grad()
def held_out_loss(target: Target, tokens: Tensor) -> float:
    rows = tokens[: len(tokens) // (SEQUENCE + 1) * (SEQUENCE + 1)].reshape(-1, SEQUENCE + 1)
    out = run_target(target, rows[:, :-1])
    return F.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def _dense(drafter: Drafter) -> DenseHead:
    return cast(DenseHead, drafter.head)


def _drafter_tensors(drafter: Drafter, centroids: Tensor, ordering: Tensor) -> dict[str, Tensor]:
    inner: dict[str, Tensor] = {
        f"model.{name}": p for name, p in drafter.named_parameters() if name.startswith(("layers.", "norm."))
    }
    return inner | {
        "model.embed_tokens.weight": _dense(drafter).weight,
        "pre_projection.weight": drafter.pre_projection.weight,
        "post_projection.weight": drafter.post_projection.weight,
        "masked_embedding.centroids.weight": centroids,
        "masked_embedding.token_ordering": ordering.flatten(),
    }


def load_drafter(drafter: Drafter, directory: Path) -> None:
    """Start from a saved drafter; the inverse of `_drafter_tensors`, clusters aside."""
    stored = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    stored["head.weight"] = stored.pop("model.embed_tokens.weight")
    names = {name.removeprefix("model."): tensor for name, tensor in stored.items() if "masked" not in name}
    drafter.load_state_dict(names | {"target_embed_tokens.weight": drafter.target_embed_tokens.weight})


def new_drafter(directory: Path, target: Target, ops: Ops) -> Drafter:
    """An untrained drafter over the target's embedding, which is not trained with it."""
    drafter = Drafter(read_drafter_config(directory), None, ops)
    drafter.target_embed_tokens.weight = target.embed_tokens.weight
    _initialise(drafter, keep=drafter.target_embed_tokens.weight.requires_grad_(False))
    return drafter


def save_drafter(drafter: Drafter, target: Target, tokens: Tensor, directory: Path) -> None:
    """Write a trained drafter, with clusters made for it."""
    head, clusters = _dense(drafter), drafter.config.num_centroids
    round_to_bfloat16(head)
    ordering = torch.from_numpy(equal_clusters(head.weight.detach().numpy(), clusters)).reshape(clusters, -1)
    centroids = train_centroids(drafter, target, tokens, ordering)
    _save(directory, _drafter_tensors(drafter, centroids, ordering))


def print_acceptance(directory: Path, texts: list[str]) -> None:
    """Print what a saved pair reaches on the beginnings of texts."""
    reached = measure(open_pair(directory / "target", directory / "drafter"), texts, new_tokens=96)
    print(f"accepted {reached['acceptance_rate']:.1%} of drafts in {reached['verify_passes']} passes")


def load_target(directory: Path, ops: Ops) -> Target:
    """A saved target, in float32."""
    target = Target(read_target_config(directory), ops)
    stored = load_file(directory / "model.safetensors").items()
    target.load_state_dict({name.removeprefix(TARGET_PREFIX): tensor.float() for name, tensor in stored})
    return target


def save_target(target: Target, directory: Path) -> None:
    """Write a target under the names of the published checkpoints."""
    _save(directory, {TARGET_PREFIX + name: p for name, p in target.named_parameters()})


def _save(directory: Path, tensors: dict[str, Tensor]) -> None:
    narrow = {k: t.detach().to(torch.bfloat16 if t.is_floating_point() else t.dtype) for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in narrow.items()}, directory / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
