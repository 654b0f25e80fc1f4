"""Train the built-in pair for 4 bits: `python -m exporter.demo.training.qat --pair DIR --output DIR`.

It takes an hour on one core. It reads a pair that `exporter.demo.training.train` wrote, and writes one of the same
shapes in bfloat16. The weights of the new pair lie exactly on grids: each is a low-bit integer times the scale of its
group, as in Google's `-qat-q4_0-unquantized` checkpoints. An export that stores those integers and scales is exact.

This is quantization-aware training (Jacob et al. 2018) with straight-through gradients (Bengio et al. 2013): both
models run with weights rounded to their grids, and the gradients are applied to the weights that were rounded. The
target learns the distributions of the target that it replaces, then the drafter learns those of the new target. A
target that exists in the output is not trained again.
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

GROUP_SIZE = 32  # neighbouring weights of a row that share a scale
BATCH_SEQUENCES = 8
# Fraction of the target's training tokens that are replaced by random ones, so that it also learns to match its
# teacher on text that it has not memorised.
RANDOM_TOKEN_FRACTION = 0.1


@click.command()
@click.option(
    "--pair", required=True, type=click.Path(exists=True, path_type=Path), help="Directory with `target` and `drafter`."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to write the new pair to.")
@click.option("--target-steps", default=260, show_default=True, help="Training steps of the target.")
@click.option("--target-rate", default=3e-4, show_default=True, help="Maximum learning rate of the target.")
@click.option("--drafter-steps", default=700, show_default=True, help="Training steps of the drafter.")
@click.option("--drafter-rate", default=1e-3, show_default=True, help="Maximum learning rate of the drafter.")
@click.option("--texts", default=2048, show_default=True, help="Texts that the target generates for the drafter.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
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
    """Train a pair with weights on 4-bit grids, and print loss and acceptance rate on held-out text."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    for name in ("target", "drafter"):
        (output / name).mkdir(parents=True, exist_ok=True)
        for file in (pair / name).glob("*.json"):
            shutil.copy(file, output / name)
    tokenizer = load_tokenizer(pair / "target")
    training, held_out = documents()
    tokens, unseen = pack(tokenizer, training), pack(tokenizer, held_out)

    started = time.time()
    if not (output / "target" / "model.safetensors").exists():
        teacher = load_target(pair / "target", BFLOAT16)
        target = load_target(pair / "target", EIGHT_BIT_ACTIVATIONS)
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
    drafter = new_drafter(output / "drafter", target, EIGHT_BIT_ACTIVATIONS)
    load_drafter(drafter, pair / "drafter")
    train_drafter(drafter, target, shuffled(written), drafter_steps, drafter_rate, 2.0, snapped)
    snap_model(drafter)
    save_drafter(drafter, target, tokens, output / "drafter")
    print(f"drafter: {time.time() - started:.0f} s", flush=True)
    print_acceptance(output, held_out)


def train_target(target: Target, teacher: Target, tokens: Tensor, steps: int, rate: float) -> None:
    """Train a target, with weights on their grids, to match the teacher's distribution of the next token.

    Args:
        target: the target, trained in place.
        teacher: the target before.
        tokens: [T] int64, training text.
        steps: number of training steps.
        rate: maximum learning rate.
    """
    generator = torch.Generator().manual_seed(3)

    def loss(batch: Tensor) -> Tensor:
        random_tokens = torch.randint(VOCAB, batch.shape, generator=generator)
        replaced = torch.rand(batch.shape, generator=generator) < RANDOM_TOKEN_FRACTION
        batch = torch.where(replaced, random_tokens, batch)
        with torch.no_grad():
            expected = run_target(teacher, batch).logits.log_softmax(-1).flatten(0, 1)
        actual = run_target(target, batch).logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(actual, expected, log_target=True, reduction="batchmean")

    optimise("target", target, loss, batches(tokens, BATCH_SEQUENCES, SEQUENCE_TOKENS), steps, rate, snapped)


def grid(name: str, shape: torch.Size) -> tuple[int, int]:
    """Return the grid of a weight: the bits of its integers, and how many neighbours in a row share a scale.

    Args:
        name: name of the parameter or of the checkpoint's tensor.
        shape: shape of the weight, [rows, columns].
    """
    if name.endswith("embed_tokens_per_layer.weight"):
        return 3, 16  # a group is the PLE of a token and layer, P numbers
    return 4, GROUP_SIZE if shape[-1] % GROUP_SIZE == 0 else shape[-1]


def snap(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round a weight to its grid: in each group, integers from -2^(bits-1) to 2^(bits-1) - 1 times one scale.

    Of seven scales, the one with the smallest squared error is chosen; the smaller scales clip the largest numbers.
    Scales are positive and have 5 significant bits, so bfloat16 holds every product exactly. The largest integer of
    each group is 2^(bits-1) - 1 in magnitude, or -2^(bits-1), so the scale can be computed from the group's largest
    number.

    Args:
        weight: [rows, columns] float32.
        bits: bits of the integers.
        group: neighbours in a row that share a scale; it divides the number of columns.

    Returns:
        The rounded weight [rows, columns] float32.
    """
    limit = 2 ** (bits - 1) - 1
    groups = weight.reshape(-1, group)
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-60)
    best, min_error = groups, torch.full_like(largest, torch.inf)
    for half in range(7):
        scale = round_to_five_bits(largest / (limit + half / 2))
        rounded = (groups / scale).round().clamp(-limit - 1, limit) * scale
        error = (rounded - groups).square().sum(-1, keepdim=True)
        best, min_error = torch.where(error < min_error, rounded, best), torch.minimum(error, min_error)
    return best.reshape(weight.shape)


def on_grid(weight: Tensor, bits: int, group: int) -> bool:
    """Return whether a weight lies exactly on a grid: whether each group is integers times the scale of its largest.

    Args:
        weight: [rows, columns], in any float dtype.
        bits: bits of the integers.
        group: neighbours in a row that share a scale; it divides the number of columns.
    """
    limit = 2 ** (bits - 1) - 1
    groups = weight.double().reshape(-1, group)
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-60)
    fits = torch.zeros(len(groups), dtype=torch.bool)
    for max_integer in (limit, limit + 1):
        scale = round_to_five_bits(largest / max_integer)
        integers = (groups / scale).round()
        fits |= ((integers * scale == groups) & (integers >= -limit - 1) & (integers <= limit)).all(-1)
    return bool(fits.all())


def round_to_five_bits(x: Tensor) -> Tensor:
    """Round floats of any shape to 5 significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 32).round(), exponent - 5)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are rounded to grids: every matrix that is trained."""
    return ((name, p) for name, p in model.named_parameters() if p.dim() == 2 and p.requires_grad)


def snap_model(model: nn.Module) -> None:
    """Round a model's matrices to their grids and its other parameters to bfloat16, in place."""
    for name, parameter in _weights(model):
        parameter.data = snap(parameter.data, *grid(name, parameter.shape))
    round_to_bfloat16(model)


@contextmanager
def snapped(model: nn.Module) -> Iterator[None]:
    """Round a model's matrices to their grids while the block runs; gradients of the rounded matrices are kept."""
    unrounded = [(parameter, parameter.data) for _, parameter in _weights(model)]
    for name, parameter in _weights(model):
        parameter.data = snap(parameter.data, *grid(name, parameter.shape))
    yield
    for parameter, data in unrounded:
        parameter.data = data


def rounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer to inputs rounded to 8 bits, with one scale for each row, as kernels on phones do.

    Gradients pass through the rounding unchanged.

    Args:
        x: [T, input size] float32.
        weight: [output size, input size] float32.

    Returns:
        [T, output size] float32.
    """
    step = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    rounded = x + (torch.round(x.detach() / step) * step - x.detach())
    return BFLOAT16.linear(rounded, weight)


EIGHT_BIT_ACTIVATIONS = Ops(linear=rounded_linear)


if __name__ == "__main__":
    main()
