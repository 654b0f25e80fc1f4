"""Write a bundle: graphs, weights, tokenizer and manifest, as a whole or not at all."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exporter.bundle.plain_chat import PlainChat, plain_chat
from exporter.calibration.calibrate import calibrate
from exporter.checkpoint.folding import FOLDING, folding_bytes
from exporter.checkpoint.origin import model_origin
from exporter.checkpoint.other_forms import ADAPTER_CONFIG
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.side_files import chat_template
from exporter.checkpoint.tensors import Checkpoint
from exporter.files import check_directory, check_free_space, holds_only, kept_beside, recover, replacing
from exporter.graphs.auto_recipe import refuse_rounding
from exporter.graphs.backend import load_backend
from exporter.graphs.parts import all_widths, graph_parts
from exporter.graphs.spec import kv_ports, size_limits
from exporter.graphs.split_files import too_large
from exporter.graphs.tables import outside_tables, write_table
from exporter.quantization.recipes import CLUSTERS as CLUSTERED_HEAD
from exporter.quantization.recipes import DENSE_HEAD, Recipe, check_recipe, matrices
from exporter.quantization.widths import by_width
from exporter.texts.token_texts import TokenTexts
from runtime_ref.chat import CHAT_TEMPLATE
from runtime_ref.errors import InputError
from runtime_ref.manifest import EMBEDDING, FORMAT_VERSION, HEAD, MANIFEST, SAMPLING_KEYS, Progress, file_sha256
from runtime_ref.requirements import FLOAT32, HEADS_FIRST, required_features
from runtime_ref.tokenizer import TOKENIZER

CHECKPOINT = "checkpoint"  # the manifest's `activations`

# Clusters that no checkpoint has. With this file, a bundle can still be checked against its checkpoints.
CLUSTERS = "clusters.safetensors"


@dataclass(frozen=True)
class ExportOptions:
    """How to export a pair.

    Attributes:
        backend: a key of `exporter.graphs.backend.BACKENDS`.
        recipe: how many bits each matrix is stored in.
        max_seq_len: maximum number of tokens of prompt and answer together; None for 4096, or for the target's
            `max_position_embeddings` if that is smaller.
        max_draft_tokens: maximum number of draft tokens in a round.
        force: whether an existing bundle may be replaced.
        check_room: whether to check first that disk and memory suffice.
        max_file_bytes: largest size of each file of weights; None for as few files as possible.
        calibration: texts by which the target is folded, and matrices of 4 bits that lie on no grid are rounded; None
            to fold nothing and to round each number to the nearest.
        chat: forms of the chat template's prompts; None to derive them, without tools.
    """

    backend: str
    recipe: Recipe
    max_seq_len: int | None = None
    max_draft_tokens: int = 8
    force: bool = False
    check_room: bool = True
    max_file_bytes: int | None = None
    calibration: TokenTexts | None = None
    chat: PlainChat | None = None


def export_bundle(pair: Pair, output: Path, options: ExportOptions, progress: Progress = lambda *_: None) -> str:
    """Export a pair into a bundle. The same pair, options and tool version give the same bytes.

    With a calibration that needs the same number of torch's threads and the same kind of processor. What it has
    finished is kept beside the output until the bundle is written: after a kill, the same call goes on from there.

    Args:
        pair: the target and its drafter.
        output: the directory to write; it is created or replaced when the bundle is complete.
        options: backend, recipe and limits.
        progress: called with what is being written and how many bytes of float32 weights were processed.

    Returns:
        The hexadecimal sha256 of the manifest, which holds those of all other files.

    Raises:
        InputError: the output exists or cannot be written, `max_seq_len` is too large, disk or memory do not suffice, a
            file cannot be as small as `max_file_bytes`, a weight is not finite, or the chat template is not valid. The
            output is then as it was before.
    """
    check_output(output, options.force)
    max_seq_len = plan_export(pair, output, options)
    backend, recipe = load_backend(options.backend), options.recipe
    template = chat_template(pair.target_checkpoint.directory)
    chat = options.chat or plain_chat(pair.target_checkpoint.directory, pair.tokens)
    steps = kept_beside(output) / "calibration"
    with replacing(output, lambda: _check_replaceable(output, options.force)) as directory:
        if options.calibration is not None:
            pair = calibrate(pair, recipe, backend.supported_scales(), options.calibration, steps, progress)
        parts = graph_parts(pair, recipe)
        limits = size_limits(max_seq_len, options.max_draft_tokens, pair.target.sliding_window)
        with _one_thread():
            outside = {
                name: write_table(directory, table, options.max_file_bytes, progress)
                for name, table in outside_tables(pair, recipe).items()
            }
            exported = backend.export_graphs(directory, pair, parts, limits, options.max_file_bytes, progress)
        if (source := pair.target_checkpoint.directory / TOKENIZER).is_file():
            shutil.copyfile(source, directory / TOKENIZER)
        if template is not None:
            (directory / CHAT_TEMPLATE).write_bytes(template.encode())
        if pair.table and pair.two_stage and pair.clusters_origin != "checkpoint":
            (directory / CLUSTERS).write_bytes(pair.table.to_bytes(pair.two_stage.top_k_clusters))
        if pair.folding:
            (directory / FOLDING).write_bytes(folding_bytes(pair.folding))
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "requires": [],
            "tool_version": version("gemma-mtp-export"),
            "backend": {**backend.backend_metadata(), **exported.backend_metadata},
            "recipe": recipe.name,
            "widths": by_width(all_widths(pair, recipe)),
            "max_seq_len": max_seq_len,
            "num_draft_tokens": {"default": min(4, options.max_draft_tokens), "max": options.max_draft_tokens},
            "limits": limits,
            **backend.row_multiples(),
            "tables": {HEAD if EMBEDDING in outside else EMBEDDING: exported.head_table, **outside},
            **describe(pair, options.backend),
            **({"activations": CHECKPOINT} if pair.rounds_activations else {}),
            **chat.metadata(),
            **({"calibration": asdict(pair.calibrated)} if pair.calibrated else {}),
            "source": source_of(pair),
            "files": {
                file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(directory.iterdir())
            },
        }
        manifest["requires"] = required_features(manifest)
        _check_file_sizes(manifest["files"], options.max_file_bytes)
        content = (json.dumps(manifest, indent=1) + "\n").encode()
        (directory / MANIFEST).write_bytes(content)
        shutil.rmtree(steps, ignore_errors=True)
        with contextlib.suppress(OSError):  # a command keeps more there
            steps.parent.rmdir()
    return hashlib.sha256(content).hexdigest()


def source_of(pair: Pair) -> dict[str, Any]:
    """Return the manifest's `source`: digests of the files that were exported, and where they come from."""

    def source(checkpoint: Checkpoint, **others: str) -> dict[str, Any]:
        return {"files": {**checkpoint.sha256(), **others}, **model_origin(checkpoint.directory)}

    target, adapters = source(pair.target_checkpoint), []
    for adapter in pair.adapters:  # whose config scales what its tensors add
        adapters.append(source(adapter, **{ADAPTER_CONFIG: file_sha256(adapter.directory / ADAPTER_CONFIG)}))
    if adapters:
        target["adapters"] = adapters
    return {"target": target, "drafter": source(pair.drafter_checkpoint)}


def _check_file_sizes(files: Mapping[str, Mapping[str, Any]], max_file_bytes: int | None) -> None:
    """Check what an estimate allowed: a program's size is known once it is written."""
    for name, file in files.items():
        if max_file_bytes is not None and file["size"] > max_file_bytes:
            raise too_large(name, file["size"], max_file_bytes)


def plan_export(pair: Pair, output: Path, options: ExportOptions, will_cluster: bool = False) -> int:
    """Check that an export is possible, before any work is done.

    Args:
        pair: the target and its drafter. Its head may differ from the one that will be exported.
        output: the directory to write.
        options: backend, recipe and limits.
        will_cluster: whether the pair's dense head will be made one of clusters.

    Returns:
        The maximum number of tokens of prompt and answer together.

    Raises:
        InputError: a rule of the recipe is wrong, the target has fewer positions, disk or memory do not suffice, or
            what must lie in one file exceeds `max_file_bytes`.
    """
    max_seq_len, recipe = resolve_max_seq_len(pair, options), options.recipe
    parts = graph_parts(pair, recipe)
    names = {f"{model}.{name}" for model, part in parts.items() for name in matrices(part.shapes)}
    if will_cluster:
        names = names - {DENSE_HEAD} | {CLUSTERED_HEAD}
    refuse_rounding(pair, recipe, options.backend)
    check_recipe(recipe, sorted(names))
    if pair.rounds_activations and options.backend != "onnx":
        raise InputError(
            f"--activations {CHECKPOINT} needs --backend onnx: XNNPACK multiplies integers with inputs that it has"
            " rounded itself; leave it out"
        )
    stored_bytes = sum(part.stored_bytes for part in parts.values())
    stored_bytes += sum(table.num_bytes for table in outside_tables(pair, recipe).values())
    if options.calibration is not None:
        stored_bytes += parts["target"].num_quantized_values  # a byte each, until the bundle is written
    if options.max_file_bytes is not None:
        load_backend(options.backend).check_file_size(parts, options.max_file_bytes)
    # One percent more for the scales of PLE, the graphs and the tokenizer.
    if options.check_room:
        check_free_space(output, stored_bytes * 101 // 100, load_backend(options.backend).export_memory_bytes(parts))
    return max_seq_len


def resolve_max_seq_len(pair: Pair, options: ExportOptions) -> int:
    """Return the maximum number of tokens of prompt and answer together: the option's, or its default.

    Raises:
        InputError: the target has fewer positions than the option asks for.
    """
    positions = pair.target.max_position_embeddings
    if options.max_seq_len is None:
        return min(4096, positions)
    if options.max_seq_len > positions:
        raise InputError(
            f"--max-seq-len is {options.max_seq_len}, but the target has {positions} positions; pass at most that many"
        )
    return options.max_seq_len


def describe(pair: Pair, backend: str) -> dict[str, Any]:
    """Return the manifest entries that follow from the checkpoints and the backend. FORMAT.md specifies them.

    Args:
        pair: the target and its drafter, with the head that is exported.
        backend: a key of `exporter.graphs.backend.BACKENDS`.
    """
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
                "dtype": FLOAT32,
                "layout": HEADS_FIRST,
            }
        )
    return {
        "tokens": _tokens(pair),
        "sampling": {
            **{key: getattr(pair.sampling, key) for key in SAMPLING_KEYS},
            **({} if pair.repetition_penalty == 1 else {"repetition_penalty": pair.repetition_penalty}),
        },
        "target": asdict(target),
        "drafter": asdict(pair.drafter),
        "two_stage": pair.two_stage and {"origin": pair.clusters_origin, **asdict(pair.two_stage)},
        "kv": {
            "shared_with_drafter": pair.shared_kv,
            "buffers": buffers,
        },
        "graphs": {
            name: {"file": file, **asdict(spec)}
            for name, (file, spec) in load_backend(backend).graph_specs(pair).items()
        },
    }


def _tokens(pair: Pair) -> dict[str, Any]:
    """The manifest's `tokens`; keys that few checkpoints have are left out where they say nothing."""
    tokens = asdict(pair.tokens)
    return {key: value for key, value in tokens.items() if key in ("bos", "eos", "pad") or value}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run with one torch thread: tracing and quantizing are many small operations, which gain little from a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_output(output: Path, force: bool) -> None:
    """Check, before any work is done, that a bundle can be written; what a killed export left is cleared up first.

    Args:
        output: the directory to write.
        force: whether an existing bundle may be replaced; anything else is never replaced.

    Raises:
        InputError: the output exists and may not be replaced, or another process is writing it.
    """
    recover(output)
    _check_replaceable(output, force)


def _check_replaceable(output: Path, force: bool) -> None:
    check_directory(output, force, lambda directory: holds_only(directory, MANIFEST, _listed_files), "a bundle")


def _listed_files(manifest: dict[str, Any]) -> Iterable[str]:
    if not (manifest["format_version"] and manifest["backend"]):
        raise KeyError("not a manifest of this tool")
    return manifest["files"]
