"""Write pairs of full size with random weights: `python -m exporter.demo.synthetic --size e2b --output DIR`.

They are for measuring size, memory and speed; their text means nothing. `exporter.demo.synthetic_forms` makes them.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING
from exporter.checkpoint.names import TARGET_PREFIXES, drafter_names
from exporter.demo.shards import SHARD_BYTES, TensorToWrite, write_shards
from exporter.demo.sizes import SIZES, drafter_json, target_json
from exporter.demo.synthetic_forms import FORMS, Values, mobile_config, mobile_tensors
from exporter.files import check_directory, check_free_space, holds_only, human_bytes, recover, replacing
from exporter.modeling.config import DrafterConfig, TextConfig
from exporter.modeling.drafter import drafter_shapes
from exporter.modeling.target import target_shapes
from exporter.quantization.recipes import matrices
from exporter.quantization.widths import QAT_GROUP_SIZE
from exporter.terminal import err, peak_bytes, print_json, progress_bar, run_command, traceback_option
from runtime_ref.manifest import Progress

PEAK_MEMORY_BYTES = 600 * 10**6  # 0.4 GB were measured
MARKER = "synthetic.json"  # lists the files of a pair, so that they may be replaced; written last
GENERATION = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}


class SyntheticPair:
    """Checkpoints of a target and its drafter with random weights.

    The same configurations and seed give the same bytes with one version of torch.

    Attributes:
        seed: the seed.
        form: the form of the weights.
        configs: the contents of config.json, under "target" and "drafter".
        tensors: the tensors of each checkpoint by name, under "target" and "drafter".
    """

    def __init__(self, target: TextConfig, drafter: DrafterConfig, seed: int = 0, form: str = FORMS[0]) -> None:
        """Draw random numbers.

        Args:
            target: sizes of the target.
            drafter: sizes of its drafter.
            seed: the seed.
            form: one of `FORMS`, in which weights are; those of a drafter are bfloat16 with `qat-mobile`.
        """
        self.seed, self.form = seed, form
        self._generator = torch.Generator().manual_seed(seed)
        self._values = Values(self._generator)
        self.configs = {"target": target_json(target), "drafter": drafter_json(drafter)}
        if form == "qat-mobile":
            self.configs["target"] |= mobile_config(target)
        self.tensors = {"target": self._target(target), "drafter": self._drafter(drafter)}

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.size for tensors in self.tensors.values() for tensor in tensors.values())

    def write(
        self,
        output: Path,
        force: bool = False,
        progress: Progress = lambda *_: None,
        shard_bytes: int = SHARD_BYTES,
        check_room: bool = True,
    ) -> None:
        """Write both checkpoints; after an error, nothing is left behind.

        Args:
            output: directory to write, which gets the directories `target` and `drafter`.
            force: whether to replace an earlier pair in `output`.
            progress: called with the name of each tensor and the number of bytes written.
            shard_bytes: maximum size of the tensors in one file. A larger tensor gets a file of its own.
            check_room: whether to check first that disk and memory suffice.

        Raises:
            InputError: the output exists and may not be replaced, cannot be written, or would not fit on its disk.
        """

        def is_pair(directory: Path) -> bool:
            return holds_only(directory, MARKER, lambda marker: marker["files"])

        def check() -> None:
            check_directory(output, force, is_pair, "a synthetic pair")

        recover(output)
        check()
        if check_room:
            check_free_space(output, self.size + 10**6, PEAK_MEMORY_BYTES)
        with replacing(output, check) as directory:
            for name, tensors in self.tensors.items():
                (directory / name).mkdir()
                _write_json(directory / name / "config.json", self.configs[name])
                write_shards(directory / name, tensors, shard_bytes, progress)
            _write_json(directory / "target" / "generation_config.json", GENERATION)
            _write_json(directory / MARKER, {"seed": self.seed, "files": _files(directory)})

    def _target(self, config: TextConfig) -> dict[str, TensorToWrite]:
        shapes, ple = target_shapes(config), config.hidden_size_per_layer_input
        packed = matrices(shapes) if self.form == "qat-mobile" else {}
        tensors = {
            TARGET_PREFIXES[0] + n: self._tensor(n, shape, ple) for n, shape in shapes.items() if n not in packed
        }
        stds = {name: _std(name, shape, ple) for name, shape in packed.items()}
        return tensors | mobile_tensors(self._values, config, packed, stds) if packed else tensors

    def _drafter(self, config: DrafterConfig) -> dict[str, TensorToWrite]:
        shapes = drafter_shapes(config)
        stored = {name: shapes[parameter] for parameter, name in drafter_names(shapes).items()}
        stored[CENTROIDS] = (config.num_centroids, config.text.hidden_size)
        ordering = torch.randperm(config.text.vocab_size, generator=self._generator).numpy()
        # First in the file: int64 must be aligned to 8 bytes.
        first = {TOKEN_ORDERING: TensorToWrite("I64", ordering.shape, lambda: [ordering])}
        return first | {name: self._tensor(name, shape) for name, shape in stored.items()}

    def _tensor(self, name: str, shape: tuple[int, ...], ple: int = 0) -> TensorToWrite:
        """A bfloat16 tensor, whose matrices lie on a grid of Q4_0 if that is the form."""
        if len(shape) == 1:
            mean = shape[0] ** -0.25 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            return self._values.normal(shape, mean, mean / 8)
        if self.form == "qat-q4_0" and name != CENTROIDS and shape[1] % QAT_GROUP_SIZE == 0:
            return self._values.q4_0(shape, _std(name, shape, ple))
        return self._values.normal(shape, 0.0, _std(name, shape, ple))


def _std(name: str, shape: tuple[int, ...], ple: int) -> float:
    """Standard deviation that keeps hidden states and attention scores near 1; with larger ones softmax is argmax."""
    return float((ple if "embed_tokens_per_layer" in name else shape[-1]) ** -0.5)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--size", type=click.Choice(list(SIZES)), required=True, help="Model size: e2b writes 9.4 GB, e4b 15.1 GB."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMS),
    default=FORMS[0],
    help="Form of the weights: bfloat16, on the grid of Q4_0, or packed in 2, 4 and 8 bits.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory to write the pair to.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the random weights.")
@click.option("--force", is_flag=True, help="Replace a pair that this command wrote before.")
@click.option("--skip-room-check", is_flag=True, help="Do not check first that disk and memory suffice.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@traceback_option
def synthetic(size: str, form: str, output: Path, seed: int, force: bool, skip_room_check: bool, as_json: bool) -> None:
    """Write checkpoints of a target and its drafter, in their published shapes, with random weights."""
    started = time.perf_counter()
    pair = SyntheticPair(*SIZES[size], seed, form)
    with progress_bar(err, "writing", pair.size) as progress:
        pair.write(output, force, progress, check_room=not skip_room_check)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    if as_json:
        print_json("synthetic", {"pair": str(output), "bytes": pair.size, "seconds": seconds, "peak_bytes": peak})
    message = f"wrote {output} ({human_bytes(pair.size)}) in {seconds:.0f} s, peak memory {human_bytes(peak)}"
    click.echo(message, err=True)


if __name__ == "__main__":
    run_command(synthetic)
