"""Train the built-in pair for 4 bits: `python -m exporter.demo.training.qat --pair DIR --output DIR` (an hour, one core).

It reads what `exporter.demo.training.train` wrote and writes a pair of the same shapes, in bfloat16, whose weights lie
exactly on grids of few bits, as those of Google's `-qat-q4_0-unquantized` checkpoints do. Whoever stores integers and scales
then loses nothing.

Both models run with weights that are on their grids, and the gradients of those go to weights that are not
(straight-through, Bengio et al. 2013; Jacob et al. 2018). The target learns the distributions of the target it was,
then the drafter learns the new target. A target that is already in the output is kept.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.demo.corpus import documents
from exporter.demo.training.bpe import VOCAB, load_tokenizer, pack
from exporter.demo.training.checkpoints import (
    load_drafter,
    load_target,
    new_drafter,
    print_acceptance,
    round_to_bfloat16,
    save_drafter,
    save_target,
)
from exporter.demo.training.learning import (
    BFLOAT16,
    SEQUENCE_TOKENS,
    batches,
    held_out_loss,
    optimise,
    run_target,
    shuffled,
    train_drafter,
    write_texts,
)
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target

GROUP, BATCH = 32, 8
OTHER_TOKENS = 0.1  # share of tokens exchanged for random ones while the target learns: more than it knows by heart


@click.command()
@click.option("--pair", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--target-steps", default=260, show_default=True)
@click.option("--target-rate", default=3e-4, show_default=True)
@click.option("--drafter-steps", default=700, show_default=True)
@click.option("--drafter-rate", default=1e-3, show_default=True)
@click.option("--texts", default=2048, show_default=True, help="That the target writes for the drafter.")
@click.option("--threads", default=1, show_default=True)
def main(
    pair: Path,
    output: Path,
    target_steps: int,
    target_rate: float,
    drafter_steps: int,
    drafter_rate: float,
    texts: int,
    threads: int,
) -> None:
    """Put target and drafter on their grids, and print what they reach on held-out text."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    for name in ("target", "drafter"):
        (output / name).mkdir(parents=True, exist_ok=True)
        for file in (pair / name).glob("*.json"):
            shutil.copy(file, output / name)
    tokenizer = load_tokenizer(pair / "target")
    training, held_out = documents()
    tokens, unseen = (pack(tokenizer, found) for found in (training, held_out))

    started = time.time()
    if not (output / "target" / "model.safetensors").exists():
        teacher = load_target(pair / "target", BFLOAT16)
        target = load_target(pair / "target", EIGHT_BITS)
        print(f"held-out loss: {held_out_loss(teacher, unseen):.4f} nats a token", flush=True)
        with snapped(target):
            print(f"rounded: {held_out_loss(target, unseen):.4f}", flush=True)
        train_target(target, teacher, tokens, target_steps, target_rate)
        snap_model(target)
        save_target(target, output / "target")
    target = load_target(output / "target", BFLOAT16)
    print(f"target: {time.time() - started:.0f} s, held-out loss {held_out_loss(target, unseen):.4f}", flush=True)

    started = time.time()
    written = write_texts(target, tokens, texts, seed=1)
    print(f"texts: {time.time() - started:.0f} s", flush=True)
    drafter = new_drafter(output / "drafter", target, EIGHT_BITS)
    load_drafter(drafter, pair / "drafter")
    train_drafter(drafter, target, shuffled(written), drafter_steps, drafter_rate, 2.0, snapped)
    snap_model(drafter)
    save_drafter(drafter, target, tokens, output / "drafter")
    print(f"drafter: {time.time() - started:.0f} s", flush=True)
    print_acceptance(output, held_out)


def train_target(target: Target, teacher: Target, tokens: Tensor, steps: int, rate: float) -> None:
    """Match the teacher's distribution of the next token."""
    generator = torch.Generator().manual_seed(3)

    def loss(batch: Tensor) -> Tensor:
        other = torch.randint(VOCAB, batch.shape, generator=generator)
        batch = torch.where(torch.rand(batch.shape, generator=generator) < OTHER_TOKENS, other, batch)
        with torch.no_grad():
            wanted = run_target(teacher, batch).logits.log_softmax(-1).flatten(0, 1)
        found = run_target(target, batch).logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")

    optimise("target", target, loss, batches(tokens, BATCH, SEQUENCE_TOKENS), steps, rate, snapped)


def grid(name: str, shape: torch.Size) -> tuple[int, int]:
    """Bits of a weight's numbers, and how many neighbours in a row share a scale."""
    if name.endswith("embed_tokens_per_layer.weight"):
        return 3, 16  # the P numbers of a token and layer
    return 4, GROUP if shape[-1] % GROUP == 0 else shape[-1]


def snap(weight: Tensor, bits: int, group: int) -> Tensor:
    """The weight on its grid: in each group integers of so many bits, -2^(bits-1) included, times one scale.

    Of seven scales the one with the least squared error is kept; the smaller ones clip the largest numbers. Scales are
    positive and have 5 significant bits, so bfloat16 holds every product. Each group reaches 2^(bits-1) - 1 on either
    side or -2^(bits-1), so its scale is found again from its largest number.
    """
    limit = 2 ** (bits - 1) - 1
    groups = weight.reshape(-1, group)
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-60)
    best, least = groups, torch.full_like(largest, torch.inf)
    for half in range(7):
        scale = five_bits(largest / (limit + half / 2))
        found = (groups / scale).round().clamp(-limit - 1, limit) * scale
        error = (found - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best.reshape(weight.shape)


def on_grid(weight: Tensor, bits: int, group: int) -> bool:
    """Whether a weight is, exactly, what `snap` makes: every group integers times a scale that its largest gives."""
    limit = 2 ** (bits - 1) - 1
    groups = weight.double().reshape(-1, group)
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-60)
    fits = torch.zeros(len(groups), dtype=torch.bool)
    for reached in (limit, limit + 1):
        scale = five_bits(largest / reached)
        numbers = (groups / scale).round()
        fits |= ((numbers * scale == groups) & (numbers >= -limit - 1) & (numbers <= limit)).all(-1)
    return bool(fits.all())


def five_bits(x: Tensor) -> Tensor:
    """Numbers rounded to 5 significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 32).round(), exponent - 5)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What lies on a grid: every matrix that is trained."""
    return ((name, p) for name, p in model.named_parameters() if p.dim() == 2 and p.requires_grad)


def snap_model(model: nn.Module) -> None:
    """Put the weights on their grids and round the rest to bfloat16."""
    for name, parameter in _weights(model):
        parameter.data = snap(parameter.data, *grid(name, parameter.shape))
    round_to_bfloat16(model)


@contextmanager
def snapped(model: nn.Module) -> Iterator[None]:
    """Weights on their grids while it lasts; gradients are kept."""
    free = [(parameter, parameter.data) for _, parameter in _weights(model)]
    for name, parameter in _weights(model):
        parameter.data = snap(parameter.data, *grid(name, parameter.shape))
    yield
    for parameter, data in free:
        parameter.data = data


def rounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer whose inputs are rounded to 8 bits, each row by its largest number, as kernels on phones do."""
    step = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    rounded = x + (torch.round(x.detach() / step) * step - x.detach())
    return BFLOAT16.linear(rounded, weight)


EIGHT_BITS = Ops(linear=rounded_linear)


if __name__ == "__main__":
    main()
