"""Summarize a bundle or a checkpoint, for the `inspect` command."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.checkpoint.config_json import read_drafter_config, read_target_config
from exporter.checkpoint.values import read_object
from exporter.quantization.widths import by_width
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, Manifest, changed_files, read_manifest
from runtime_ref.session_file import session_sizes

if TYPE_CHECKING:
    from exporter.checkpoint.tensors import Checkpoint


def inspect(path: Path) -> dict[str, Any]:
    """Return the properties of a bundle, a checkpoint or a session, as the JSON document of `inspect --json`.

    A checkpoint's names and shapes are checked as an export would check them. Files of a bundle whose digests differ
    from the manifest's are listed in `changed_files`.

    Args:
        path: directory of a bundle, a target or a drafter, or a session's file.

    Raises:
        InputError: the path is neither of them, or what it holds is broken.
    """
    if path.is_file():
        try:
            return session_sizes(path)
        except InputError as error:
            raise InputError(f"{error}; or pass the directory of a bundle or a checkpoint") from error
    if not path.is_dir():
        found = "neither a directory nor a file" if path.exists() else "not found"
        raise InputError(f"{path}: {found}; pass the directory of a bundle or a checkpoint, or a session's file")
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        copied = {key: manifest.raw[key] for key in ("recipe", "max_seq_len", "num_draft_tokens", "tokens")}
        return {
            "kind": "bundle",
            "format_version": manifest.format_version,
            "digest": manifest.digest,
            "requires": [feature["name"] for feature in manifest.raw["requires"]],
            "backend": _with_delegated_fractions(path, manifest.raw["backend"]),
            **copied,
            "target": _sizes(manifest.raw["target"]),
            "drafter": _sizes(manifest.raw["drafter"]["text"]),
            "two_stage": manifest.raw["two_stage"],
            **_calibration(manifest),
            **_widths(manifest),
            "kv_bytes_per_token": _row_bytes(manifest, "full_attention"),
            "kv_sliding_bytes": manifest.limits["window_rows"] * _row_bytes(manifest, "sliding_attention"),
            "tables": manifest.raw["tables"],
            "source": manifest.raw["source"],
            "files": {name: size for name, (size, _) in manifest.files.items()},
            "total_bytes": sum(size for size, _ in manifest.files.values()),
            "changed_files": changed_files(path, manifest),
        }
    if read_object(path / "config.json").get("model_type") == "gemma4_assistant":
        return _inspect_drafter(path)
    return _inspect_target(path)


def _calibration(manifest: Manifest) -> dict[str, Any]:
    """Return how the target was calibrated, with the number of matrices in the place of their names."""
    if "calibration" not in manifest.raw:
        return {}
    return {"calibration": {**manifest.raw["calibration"], "matrices": len(manifest.raw["calibration"]["matrices"])}}


def _widths(manifest: Manifest) -> dict[str, Any]:
    """Return how matrices are stored, with those of the same name in all layers as one, such as `target.layers.*.x`."""
    return {"widths": _by_layer(manifest.raw["widths"])} if "widths" in manifest.raw else {}


def _by_layer(widths: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**entry, "matrices": dict(Counter(re.sub(r"\blayers\.\d+\.", "layers.*.", n) for n in entry["matrices"]))}
        for entry in widths
    ]


def _row_bytes(manifest: Manifest, layer_type: str) -> int:
    """Return the bytes that K and V of one position take in all storing layers of a type."""
    buffers = [kv for kv in manifest.kv if kv.layer_type == layer_type]
    return sum(prod(kv.shape(1)) * np.dtype(kv.dtype).itemsize for kv in buffers)


def _with_delegated_fractions(path: Path, backend: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's `backend`, with the delegated fraction, 0 to 1, of each graph's operations and weights.

    Digests of calibrated matrices are left out.
    """
    backend = {key: value for key, value in backend.items() if key != "calibrated"}
    if "delegation" not in backend:
        return backend
    graphs = {}
    try:
        for name, counts in backend["delegation"].items():
            fractions = {}
            for part in ("ops", "weight_bytes"):
                delegated = counts[f"delegated_{part}"]
                fractions[f"delegated_{part}_share"] = round(delegated / (delegated + counts[f"portable_{part}"]), 3)
            graphs[name] = {**fractions, **counts}
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path / MANIFEST}: backend.delegation is malformed ({reason}); export the bundle again"
        ) from error
    return {**backend, "delegation": graphs}


def _inspect_target(path: Path) -> dict[str, Any]:
    from exporter.checkpoint.names import target_weights
    from exporter.checkpoint.packed import find_packed
    from exporter.checkpoint.tensors import Checkpoint, IntegerReader
    from exporter.modeling.target import target_shapes

    config, checkpoint = read_target_config(path), Checkpoint(path)
    used = target_weights(checkpoint, config)
    _, of_packed = find_packed(checkpoint)
    widths = {name: read.width for name, read in used.items() if isinstance(read, IntegerReader)}
    shapes = target_shapes(config, own_head=True)
    numbers = sum(prod(shapes[name]) for name in widths)
    return {
        "kind": "target",
        "target": _sizes(asdict(config)),
        **({"widths": _by_layer(by_width(widths))} if widths else {}),
        # A packed matrix is stored as two tensors: its numbers and its scales.
        **_tensors(checkpoint, len(used) + len(widths), numbers, of_packed),
    }


def _inspect_drafter(path: Path) -> dict[str, Any]:
    import torch  # not needed for bundles, which can be inspected where it is not installed

    from exporter.checkpoint.names import drafter_weights, read_cluster_table
    from exporter.checkpoint.tensors import Checkpoint

    config, checkpoint = read_drafter_config(path), Checkpoint(path)
    table = read_cluster_table(checkpoint, config)
    # This checks every name and shape; a drafter shares the target's embedding, which is not needed for that.
    used = drafter_weights(checkpoint, config, None, {"embed_tokens.weight": lambda: torch.empty(0)})
    return {
        "kind": "drafter",
        "drafter": _sizes(asdict(config.text)),
        "backbone_hidden_size": config.backbone_hidden_size,
        "two_stage": table and asdict(table.sizes(config.centroid_intermediate_top_k)),
        **_tensors(checkpoint, len(used) - 1 + (0 if table is None else 2)),
    }


def _tensors(
    checkpoint: "Checkpoint", tensors_used: int, packed_numbers: int = 0, of_packed: Collection[str] = ()
) -> dict[str, Any]:
    """Describe tensors; those of packed matrices are not counted as parameters, but the numbers packed in them are."""
    entries = checkpoint.entries.values()
    plain = (entry for name, entry in checkpoint.entries.items() if name not in of_packed)
    return {
        "tensors": len(entries),
        "tensors_used": tensors_used,
        "parameters": packed_numbers + sum(prod(entry.shape) for entry in plain),
        "dtypes": dict(sorted(Counter(entry.dtype for entry in entries).items())),
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "total_bytes": sum(file.stat().st_size for file in checkpoint.files),
    }


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a text config with the number of layers of each type in place of the list of types."""
    return {**config, "layer_types": dict(Counter(config["layer_types"]))}
