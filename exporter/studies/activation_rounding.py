"""What rounding activations by the runtime's own range costs a target that was trained to round them by stored scales.

`python -m exporter.studies.activation_rounding` brings the built-in pair into the mobile form: 8 bits with a scale a
row, and scales of activations that hold the largest input and output of each matrix in texts that it was trained on.
It exports that for ONNX with both values of `--activations`, and compares the bundles with the checkpoint, which rounds
as transformers does, on held-out texts of the same kind. Times are taken in turns, with one thread.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from exporter.bench.measure import pass_calls, random_ids
from exporter.bench.timing import machine, milliseconds
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.names import TARGET_PREFIXES
from exporter.checkpoint.pair import Pair, open_pair
from exporter.demo import PAIR
from exporter.demo.corpus import documents
from exporter.graphs.auto_recipe import auto_recipe
from exporter.modeling.layers import Matrix
from exporter.modeling.target import empty_kv
from exporter.parity.quality import Quality, measure_quality
from exporter.texts.token_texts import TokenTexts, token_texts
from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling

MAX_SEQ_LEN, NUM_DOCUMENTS = 512, 64
TABLES = ("embed_tokens", "embed_tokens_per_layer")


def write_mobile(pair: Pair, texts: TokenTexts, directory: Path) -> None:
    """Write the target of a pair in the mobile form, in 8 bits.

    Args:
        pair: the pair; weights of its target are floats.
        texts: texts whose activations the scales hold.
        directory: directory to write.
    """
    shutil.copytree(pair.target_checkpoint.directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    target, tensors = pair.load_target(), {}
    matrices = {name: module for name, module in target.named_modules() if isinstance(module, Matrix)}
    largest: dict[str, list[float]] = {name: [0.0, 0.0] for name in matrices}
    with torch.no_grad(), _watched(matrices, largest):
        for text in texts.texts:
            ids = torch.tensor(text[:MAX_SEQ_LEN])
            target(ids, torch.tensor([0]), torch.arange(len(ids)), empty_kv(pair.target, len(ids)))
    for name, weight in target.named_parameters():
        module, stored = name.removesuffix(".weight"), TARGET_PREFIXES[0] + name.removesuffix(".weight")
        if module not in matrices:
            tensors[TARGET_PREFIXES[0] + name] = weight.data
            continue
        groups = pair.target.num_hidden_layers if module.endswith("per_layer") else 1
        rows = weight.data.view(len(weight), groups, -1)
        scales = rows.abs().amax(2, keepdim=True).clamp(min=1e-8) / 127
        numbers = (rows / scales).round().to(torch.int8).view(weight.shape)
        if module in TABLES:
            tensors |= {f"{stored}.embedding_quantized": numbers, f"{stored}.embedding_scale": scales.squeeze(2)}
        if module == "embed_tokens":
            stored = "lm_head"
        if module != "embed_tokens_per_layer":
            tensors |= {f"{stored}.weight": numbers.clone(), f"{stored}.weight_scale": scales.squeeze(2).clone()}
            for end, value in zip(("input", "output"), largest[module], strict=True):
                tensors[f"{stored}.{end}_activation_scale"] = torch.tensor(value / 127)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    settings = {"quant_method": "gemma", "num_bits": 8, "quantize_embeddings": True}
    (directory / "config.json").write_text(
        json.dumps({**raw, "quantization_config": settings, "tie_word_embeddings": False})
    )


@contextmanager
def _watched(matrices: dict[str, Matrix], largest: dict[str, list[float]]) -> Iterator[None]:
    """Keep the largest magnitudes of inputs and products of matrices, by name, while the block runs."""
    for name, matrix in matrices.items():
        matrix.__dict__["multiply"] = _watching(matrix.multiply, largest[name])
    yield
    for matrix in matrices.values():
        del matrix.__dict__["multiply"]


def _watching(multiply: Callable[[Tensor], Tensor], largest: list[float]) -> Callable[[Tensor], Tensor]:
    def watching(x: Tensor) -> Tensor:
        products = multiply(x)
        largest[:] = (max(old, float(new.abs().max())) for old, new in zip(largest, (x, products), strict=True))
        return products

    return watching


def compare(directory: Path) -> dict[str, tuple[Quality, float]]:
    """Return quality and milliseconds of a decode step by value of `--activations`; bundles go to `directory`."""
    floats, texts = open_pair(PAIR / "target", PAIR / "drafter"), []
    for name, chosen in zip(("trained on", "held out"), documents(), strict=True):
        (file := directory / f"{name}.txt").write_text("\n\n".join(chosen[:: len(chosen) // NUM_DOCUMENTS]))
        texts.append(token_texts(floats, file))
    held_out = replace(texts[1], kinds=("documentation",) * len(texts[1].texts))
    write_mobile(floats, texts[0], directory / "target")
    pair, qualities, calls = open_pair(directory / "target", PAIR / "drafter"), {}, {}
    for name, exported in (("runtime", pair), ("checkpoint", pair.with_activations())):
        bundle = directory / name
        export_bundle(exported, bundle, ExportOptions("onnx", auto_recipe(exported)[0], MAX_SEQ_LEN))
        engine = load_engine(bundle, read_manifest(bundle), threads=1)
        qualities[name] = measure_quality(engine, pair, [], 0, held_out)
        engine.prefill(random_ids(engine.manifest, 256), Sampling())
        calls[name] = pass_calls(engine)[0][1]
    times = milliseconds(calls)
    return {name: (quality, times[name][0]) for name, quality in qualities.items()}


@click.command()
def main() -> None:
    """Export the built-in pair in the mobile form with both ways to round activations, and print what each gives."""
    with tempfile.TemporaryDirectory() as directory:
        found = compare(Path(directory))
    table = Table(
        "--activations", title=f"The built-in pair in 8 bits with stored scales, ONNX\n{machine()}, one thread"
    )
    for heading in ("KL, nats", "kept choices", "perplexity", "decode ms"):
        table.add_column(heading, justify="right")
    for name, (quality, time) in found.items():
        whole = quality.whole
        table.add_row(name, f"{whole.kl:.5f}", f"{whole.agreement:.1%}", f"{whole.perplexity:.3f}", f"{time:.2f}")
    table.add_row("the checkpoint itself", "", "", f"{whole.perplexity_fp32:.3f}", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
