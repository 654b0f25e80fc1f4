"""Write a bundle: graphs, weights, tokenizer and manifest, all of it or nothing."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from exporter.bundle.chat_format import chat_format
from exporter.checkpoint.generation_config import chat_template
from exporter.checkpoint.pair import Pair
from exporter.files import check_directory, check_room, holds_only, remove_leftovers, replacing
from exporter.graphs.backend import load_backend
from exporter.graphs.parts import GraphParts, graph_parts
from exporter.graphs.spec import kv_ports, size_limits
from exporter.graphs.tables import PER_LAYER, write_per_layer
from exporter.quantization.recipes import RECIPES
from runtime_ref.chat import CHAT_TEMPLATE
from runtime_ref.errors import InputError
from runtime_ref.manifest import FORMAT_VERSION, MANIFEST, SAMPLING_KEYS, Progress, file_sha256
from runtime_ref.tokenizer import TOKENIZER

# Clusters that are in no checkpoint, so that a bundle can be checked against its checkpoints.
CLUSTERS = "clusters.safetensors"


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose. No `max_seq_len` means 4096, or all the positions a target knows if they are fewer."""

    backend: str = "onnx"
    recipe: str = "fp32"
    max_seq_len: int | None = None
    max_draft_tokens: int = 8
    force: bool = False


def export_bundle(pair: Pair, output: Path, options: ExportOptions, progress: Progress = lambda *_: None) -> None:
    """Export a pair. The same pair and tool give the same bytes.

    Raises:
        InputError: the output exists, cannot be written, a weight is not finite, or the chat template is none; nothing
            is left behind.
    """
    check_output(output, options.force)
    remove_leftovers(output)
    max_seq_len, parts = plan_export(pair, output, options)
    backend, recipe = load_backend(options.backend), RECIPES[options.recipe]
    template = chat_template(pair.target_checkpoint.directory)
    with replacing(output) as directory, _one_thread():
        limits = size_limits(max_seq_len, options.max_draft_tokens, pair.target.sliding_window)
        per_layer = write_per_layer(directory, pair, recipe.per_layer, progress)
        exported = backend.export_graphs(directory, pair, parts, limits, progress)
        if (source := pair.target_checkpoint.directory / TOKENIZER).is_file():
            shutil.copyfile(source, directory / TOKENIZER)
        if template is not None:
            (directory / CHAT_TEMPLATE).write_bytes(template.encode())
        chat = chat_format(directory, pair.tokens)
        if pair.table and pair.two_stage and pair.clusters_origin != "checkpoint":
            (directory / CLUSTERS).write_bytes(pair.table.to_bytes(pair.two_stage.top_k_clusters))
        manifest = {
            "format_version": FORMAT_VERSION,
            "tool_version": version("gemma-mtp-export"),
            "backend": {**backend.runtime(), **exported.backend},
            "recipe": options.recipe,
            "max_seq_len": max_seq_len,
            "num_draft_tokens": {"default": min(4, options.max_draft_tokens), "max": options.max_draft_tokens},
            "limits": limits,
            **backend.row_multiples(),
            "tables": {"embed_tokens": exported.embedding, "embed_tokens_per_layer": per_layer},
            **describe(pair, options.backend),
            **({"chat": asdict(chat)} if chat else {}),
            "source": {"target": pair.target_checkpoint.sha256(), "drafter": pair.drafter_checkpoint.sha256()},
            "files": {
                file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(directory.iterdir())
            },
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def plan_export(pair: Pair, output: Path, options: ExportOptions) -> tuple[int, dict[str, GraphParts]]:
    """What an export is told by its pair and options: most tokens of prompt and answer, and what its graphs hold.

    Raises:
        InputError: the target knows fewer positions, or disk or memory would run out.
    """
    max_seq_len, recipe = sequence_limit(pair, options), RECIPES[options.recipe]
    parts = graph_parts(pair, recipe)
    stored = sum(part.stored_bytes for part in parts.values())
    stored += prod(parts["target"].shapes[PER_LAYER]) * recipe.per_layer.bits // 8
    # A hundredth more for scales of PLE, graphs and tokenizer.
    check_room(output, stored * 101 // 100, load_backend(options.backend).memory(parts))
    return max_seq_len, parts


def sequence_limit(pair: Pair, options: ExportOptions) -> int:
    """Most tokens of prompt and answer together.

    Raises:
        InputError: the target knows fewer positions.
    """
    known = pair.target.max_position_embeddings
    if options.max_seq_len is None:
        return min(4096, known)
    if options.max_seq_len > known:
        raise InputError(
            f"--max-seq-len is {options.max_seq_len}, the target knows {known} positions; ask for at most that"
        )
    return options.max_seq_len


def describe(pair: Pair, backend: str) -> dict[str, Any]:
    """The part of a manifest that checkpoints and backend decide, as FORMAT.md specifies it."""
    target = pair.target
    buffers = []
    for port in kv_ports(target):
        layer = int(port.name.rpartition("_")[2])
        heads, _, dim = port.shape
        buffers.append(
            {
                "name": port.name,
                "layer": layer,
                "layer_type": target.layer_types[layer],
                "num_key_value_heads": heads,
                "head_dim": dim,
            }
        )
    return {
        "tokens": asdict(pair.tokens),
        "sampling": {key: getattr(pair.sampling, key) for key in SAMPLING_KEYS},
        "target": asdict(target),
        "drafter": asdict(pair.drafter),
        "two_stage": pair.two_stage and {"origin": pair.clusters_origin, **asdict(pair.two_stage)},
        "kv": {
            "dtype": "float32",
            "layout": ["num_key_value_heads", "rows", "head_dim"],
            "shared_with_drafter": pair.shared_kv,
            "buffers": buffers,
        },
        "graphs": {
            name: {"file": file, **asdict(spec)}
            for name, (file, spec) in load_backend(backend).graph_specs(pair).items()
        },
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tracing and quantizing are many small operations: a second thread gains little, and waits where others work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that exists, before any work is done; `force` replaces a bundle, never anything else.

    Raises:
        InputError: it exists, and is not to be or must not be replaced.
    """
    check_directory(output, force, lambda directory: holds_only(directory, MANIFEST, _listed_files), "a bundle")


def _listed_files(manifest: dict[str, Any]) -> Iterable[str]:
    if not (manifest["format_version"] and manifest["backend"]):
        raise KeyError("not a manifest of this tool")
    return manifest["files"]
