"""Pairs of full size with random weights, for measuring: `python -m exporter.demo.synthetic --size e2b --output DIR`.

Values are drawn once, as many as a prime number, and each tensor is that sequence from a random place on, repeated and
scaled. A table has fewer rows than that, so no two of them begin at the same place: none are equal.
"""

import functools
import json
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING
from exporter.checkpoint import TARGET_PREFIXES, drafter_names, parameter_shapes
from exporter.config import DrafterConfig, TextConfig, read_object
from exporter.console import peak_bytes, progress_bar, run_command
from exporter.demo.sizes import SIZES, drafter_json, target_json
from exporter.files import check_directory, check_room, human_bytes, replacing
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target
from exporter.shards import SHARD_BYTES, TensorToWrite, write_shards
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

PERIOD = 2**24 - 3  # prime
MEMORY = 600 * 10**6  # measured: 0.4 GB
MARKER = "synthetic.json"  # names the files, so that they may be replaced; written last
GENERATION = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}


class SyntheticPair:
    """The checkpoints of a seed. The same seed gives the same bytes, under one version of torch."""

    def __init__(self, target: TextConfig, drafter: DrafterConfig, seed: int = 0) -> None:
        self.seed, self._generator = seed, torch.Generator().manual_seed(seed)
        self._values = torch.randn(PERIOD, generator=self._generator).bfloat16()
        self.configs = {"target": target_json(target), "drafter": drafter_json(drafter)}
        self.tensors = {"target": self._target(target), "drafter": self._drafter(drafter)}

    @property
    def size(self) -> int:
        """Of all tensors, in bytes."""
        return sum(tensor.size for tensors in self.tensors.values() for tensor in tensors.values())

    def write(
        self, output: Path, force: bool = False, progress: Progress = lambda *_: None, shard: int = SHARD_BYTES
    ) -> None:
        """Write `target`, in files of up to `shard` bytes where a tensor is not larger, and `drafter`.

        Raises:
            InputError: the output exists, cannot be written or does not fit on its disk; nothing is left behind.
        """
        check_directory(output, force, _only_a_pair, "a synthetic pair")
        check_room(output, self.size + 10**6, MEMORY)
        with replacing(output) as directory:
            for name, tensors in self.tensors.items():
                (directory / name).mkdir()
                _write_json(directory / name / "config.json", self.configs[name])
                write_shards(directory / name, tensors, shard, progress)
            _write_json(directory / "target" / "generation_config.json", GENERATION)
            _write_json(directory / MARKER, {"seed": self.seed, "files": _files(directory)})

    def _target(self, config: TextConfig) -> dict[str, TensorToWrite]:
        shapes, ple = parameter_shapes(lambda: Target(config)), config.hidden_size_per_layer_input
        return {TARGET_PREFIXES[0] + name: self._normal(name, shape, ple) for name, shape in shapes.items()}

    def _drafter(self, config: DrafterConfig) -> dict[str, TensorToWrite]:
        shapes = parameter_shapes(lambda: Drafter(config, None))
        stored = {name: shapes[ours] for ours, name in drafter_names(shapes).items()}
        stored[CENTROIDS] = (config.num_centroids, config.text.hidden_size)
        ordering = torch.randperm(config.text.vocab_size, generator=self._generator).numpy()
        # int64 first, where it is aligned
        first = {TOKEN_ORDERING: TensorToWrite("I64", ordering.shape, lambda: [ordering])}
        return first | {name: self._normal(name, shape) for name, shape in stored.items()}

    def _normal(self, name: str, shape: tuple[int, ...], ple: int = 0) -> TensorToWrite:
        """In scales that keep states near 1, and the scores of attention too, or softmax would turn into argmax."""
        mean, std = 0.0, (ple if "embed_tokens_per_layer" in name else shape[-1]) ** -0.5
        if len(shape) == 1:
            mean = shape[0] ** -0.25 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            std = mean / 8
        start = int(torch.randint(PERIOD, (), generator=self._generator))
        return TensorToWrite("BF16", shape, functools.partial(self._pieces, start, prod(shape), mean, std))

    def _pieces(self, start: int, left: int, mean: float, std: float) -> Iterator[np.ndarray]:
        while left:
            piece = self._values[start : start + left] * std
            start, left = 0, left - len(piece)
            yield (piece + mean if mean else piece).view(torch.int16).numpy()  # numpy has no bfloat16


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def _only_a_pair(directory: Path) -> bool:
    """Whether a directory is empty, or holds one of our markers and nothing but what that names."""
    if not (directory / MARKER).exists():
        return not any(directory.iterdir())
    try:
        return {*_files(directory)} <= {MARKER, *read_object(directory / MARKER)["files"]}
    except (InputError, KeyError, TypeError):
        return False


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--size", type=click.Choice(list(SIZES)), required=True, help="e2b takes 9.4 GB, e4b 15.1 GB.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="For `target` and `drafter`.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
@click.option("--force", is_flag=True, help="Replace a pair that this command wrote.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def synthetic(size: str, output: Path, seed: int, force: bool, as_json: bool) -> None:
    """Write checkpoints of a target and its drafter with random weights in their true shapes."""
    started = time.perf_counter()
    pair = SyntheticPair(*SIZES[size], seed)
    with progress_bar(Console(stderr=True, markup=False, soft_wrap=True), "writing", pair.size) as progress:
        pair.write(output, force, progress)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    if as_json:
        click.echo(json.dumps({"pair": str(output), "bytes": pair.size, "seconds": seconds, "peak_bytes": peak}))
    told = f"wrote {output} ({human_bytes(pair.size)}) in {seconds:.0f} s, peak memory {human_bytes(peak)}"
    click.echo(told, err=True)


if __name__ == "__main__":
    run_command(synthetic)
