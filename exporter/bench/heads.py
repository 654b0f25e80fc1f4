"""Two-stage logits against the dense head at full size: `python -m exporter.bench.heads`.

Random rows, one state a call, one thread; each backend with tables of 32, 8 and 4 bits. Dense heads are the backend's
own best: on ONNX Runtime Gemm and MatMulNBits (blocks of 32, activations of 8 bits), on ExecuTorch XNNPACK's linear
layers in float32 and with activations of 8 bits, weights of 8 by row or of 4 in groups of 32. Ratios are of minima:
what else the machine does only ever adds time.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import click
import torch
from executorch.extension.pybindings import portable_lib
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from clustering.cluster_table import TwoStageSizes
from exporter.backends.executorch_ops import Constants
from exporter.backends.onnx import OPS
from exporter.bench import machine, milliseconds
from exporter.bench.programs import Run, converted, lowered
from exporter.modeling.layers import Ops
from exporter.modeling.two_stage import DenseHead, TwoStageHead
from exporter.quantize import quantize_clusters

BITS = (32, 8, 4)
GROUP = 32


def two_stage_head(vocab_size: int, hidden: int, sizes: TwoStageSizes, bits: int, ops: Ops) -> nn.Module:
    """A head over random clusters."""
    head = TwoStageHead(hidden, sizes, ops, bits)
    rows = torch.randn(sizes.num_clusters, sizes.cluster_size, hidden)
    head.centroids.copy_(rows.mean(1))
    head.token_ids.copy_(torch.randperm(vocab_size).reshape(sizes.num_clusters, -1))
    if bits < 32:
        rows, scales = quantize_clusters(rows, bits)
        head.scales.copy_(scales)
    head.clusters.copy_(rows.flatten(1))
    return head


class OnnxDense(nn.Module):
    """Quantized logits of every token, by the operation that ONNX Runtime has for them; the lowest id on a tie."""

    def __init__(self, vocab_size: int, hidden: int, bits: int) -> None:
        super().__init__()
        self.shape, self.bits = (vocab_size, hidden), bits
        blocks = torch.randint(256, (vocab_size, hidden // GROUP, GROUP * bits // 8), dtype=torch.uint8)
        self.blocks = nn.Parameter(blocks, requires_grad=False)
        self.scales = nn.Parameter(torch.rand(vocab_size * hidden // GROUP))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens, width = self.shape
        logits = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (hidden, self.blocks, self.scales),
            {"K": width, "N": tokens, "bits": self.bits, "block_size": GROUP, "accuracy_level": 4},
            dtype=hidden.dtype,
            shape=(hidden.shape[0], tokens),
            version=1,
        )
        return logits.argmax(-1)


class ExecutorchDense(nn.Module):
    """Logits of every token by a linear layer, which XNNPACK packs; the lowest id on a tie."""

    def __init__(self, vocab_size: int, hidden: int, bits: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, vocab_size, bias=False)
        if bits < 32:
            dtype, granularity = {8: (torch.int8, PerAxis(0)), 4: (torch.int4, PerGroup(GROUP))}[bits]  # type: ignore[attr-defined]
            config = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
            quantize_(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).argmax(-1)


def onnx_head(vocab_size: int, hidden: int, sizes: TwoStageSizes | None, bits: int) -> Run:
    if sizes is not None:
        head = two_stage_head(vocab_size, hidden, sizes, bits, OPS)
    elif bits < 32:
        head = OnnxDense(vocab_size, hidden, bits)
    else:
        head = DenseHead(vocab_size, hidden, OPS)
        nn.init.normal_(head.weight)
    return converted(head, torch.randn(1, hidden))


def executorch_head(vocab_size: int, hidden: int, sizes: TwoStageSizes | None, bits: int) -> Run:
    if sizes is not None:
        head = two_stage_head(vocab_size, hidden, sizes, bits, Constants().ops())
    else:
        head = ExecutorchDense(vocab_size, hidden, bits)
    return lowered(head, torch.randn(1, hidden))


BACKENDS: dict[str, Callable[[int, int, TwoStageSizes | None, int], Run]] = {
    "onnx": onnx_head,
    "executorch": executorch_head,
}


@dataclass(frozen=True)
class Row:
    """What one head took."""

    backend: str
    head: str
    bits: int
    median_ms: float
    min_ms: float
    times_faster_than_dense: dict[int, float]


def measure(backend: str, vocab_size: int, hidden: int, sizes: TwoStageSizes) -> list[Row]:
    """Both heads with every table. Each call has another state, so that clusters come from memory, not from a cache."""
    heads = {
        (name, bits): BACKENDS[backend](vocab_size, hidden, kind, bits)
        for name, kind in (("dense", None), ("two-stage", sizes))
        for bits in BITS
    }
    states = itertools.cycle(torch.randn(256, 1, hidden))
    times = milliseconds({key: functools.partial(_call, run, states) for key, run in heads.items()})
    return [
        Row(backend, *key, median, least, {b: times["dense", b][1] / least for b in BITS})
        for key, (median, least) in times.items()
    ]


def _call(run: Run, states: Iterator[Tensor]) -> None:
    run(next(states))


@click.command()
@click.option("--vocab-size", default=262144, show_default=True)
@click.option("--hidden", default=256, show_default=True)
@click.option("--clusters", default=2048, show_default=True)
@click.option("--top-k-clusters", default=32, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@torch.no_grad()
def main(vocab_size: int, hidden: int, clusters: int, top_k_clusters: int, as_json: bool) -> None:
    """Time both heads on both backends and print milliseconds and ratios."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    portable_lib._unsafe_reset_threadpool(1)
    sizes = TwoStageSizes(clusters, vocab_size // clusters, top_k_clusters)
    rows = [row for backend in BACKENDS for row in measure(backend, vocab_size, hidden, sizes)]
    if as_json:
        heads = [asdict(row) for row in rows]
        click.echo(json.dumps({"machine": machine(), "vocab_size": vocab_size, "hidden": hidden, "heads": heads}))
        return
    size = f"{vocab_size} x {hidden}, {top_k_clusters} of {clusters} clusters kept"
    table = Table("backend", "head", title=f"A draft token from a state: {size}\n{machine()}, one thread")
    for heading in ("bits", "median ms", "min ms", *(f"times faster than dense {bits}" for bits in BITS)):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = [
            f"{row.median_ms:.2f}",
            f"{row.min_ms:.2f}",
            *(f"{r:.1f}" for r in row.times_faster_than_dense.values()),
        ]
        table.add_row(row.backend, row.head, str(row.bits), *figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
