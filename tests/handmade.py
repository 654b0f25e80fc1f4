"""Bundles with features that no export writes yet, made by hand from an exported ONNX bundle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from runtime_ref.manifest import MANIFEST, file_sha256
from runtime_ref.requirements import required_features
from runtime_ref.tables import Table

Change = Callable[[Path, dict[str, Any]], None]


def handmade(source: Path, output: Path, *changes: Change) -> Path:
    """Copy a bundle, change its files and its manifest, and let the manifest say what it requires.

    Args:
        source: an exported ONNX bundle.
        output: directory to write.
        changes: called with `output` and the manifest.

    Returns:
        `output`.
    """
    shutil.copytree(source, output)
    manifest = json.loads((output / MANIFEST).read_text())
    for change in changes:
        change(output, manifest)
    manifest["files"] = listed_files(output)
    if manifest["format_version"] > 2:
        manifest["requires"] = required_features(manifest)
    (output / MANIFEST).write_text(json.dumps(manifest))
    return output


def listed_files(bundle: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest's `files` for the files that a bundle has."""
    return {
        file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(bundle.iterdir())
        if file.name != MANIFEST
    }


def with_float16_cache(bundle: Path, manifest: dict[str, Any]) -> None:
    """Let the graphs take and return the cache in float16, which they convert."""
    for entry in manifest["kv"]["buffers"]:
        entry["dtype"] = "float16"
    into = {"op_type": "Cast", "to": TensorProto.FLOAT}
    back = {"op_type": "Cast", "to": TensorProto.FLOAT16}
    _convert_cache(bundle, manifest, TensorProto.FLOAT16, lambda shape: shape, into, back)


def with_rows_first(bundle: Path, manifest: dict[str, Any]) -> None:
    """Let the graphs take and return the cache with the rows as the first dimension."""
    for entry in manifest["kv"]["buffers"]:
        entry["layout"] = ["rows", "num_key_value_heads", "head_dim"]
    swap = {"op_type": "Transpose", "perm": [1, 0, 2]}
    _convert_cache(bundle, manifest, TensorProto.FLOAT, lambda shape: [shape[1], shape[0], shape[2]], swap, swap)


def without_per_layer(bundle: Path, manifest: dict[str, Any]) -> None:
    """Let the target's graph compute with PLE of zeros, which the bundle no longer has."""
    columns = manifest["tables"].pop("embed_tokens_per_layer")["columns"]
    (bundle / "per_layer.table").unlink()
    model = onnx.load(bundle / "target.onnx", load_external_data=False)
    inputs = [port for port in model.graph.input if port.name != "per_layer"]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    first = helper.make_node("Shape", ["embedded"], ["num_tokens"], start=0, end=1)
    width = helper.make_node("Constant", [], ["per_layer_columns"], value_ints=[columns])
    size = helper.make_node("Concat", ["num_tokens", "per_layer_columns"], ["per_layer_size"], axis=0)
    zeros = helper.make_node("ConstantOfShape", ["per_layer_size"], ["per_layer"])
    _prepend(model.graph, [first, width, size, zeros])
    onnx.save(model, bundle / "target.onnx")
    ports = manifest["graphs"]["target"]["inputs"]
    ports[:] = [port for port in ports if port["name"] != "per_layer"]


def with_zero_per_layer(bundle: Path, manifest: dict[str, Any]) -> None:
    """Make every number of the PLE 0."""
    del manifest
    file = bundle / "per_layer.table"
    file.write_bytes(bytes(file.stat().st_size))


def with_own_head(bundle: Path, manifest: dict[str, Any]) -> None:
    """Give the target's head a table of its own, whose numbers are the embedding's times -2."""
    entry = manifest["tables"]["embed_tokens"]
    rows = Table(bundle, entry)[range(entry["rows"])] * np.float32(-2)
    (bundle / "head.table").write_bytes(rows.tobytes())
    place = {"file": "head.table", "offset": 0, "rows": entry["rows"]}
    manifest["tables"]["head"] = {
        **{key: entry[key] for key in ("rows", "columns")},
        **{"encoding": "float32", "row_bytes": 4 * entry["columns"], "group_size": entry["columns"]},
        "data": {"parts": [place]},
    }


def with_split_tables(bundle: Path, manifest: dict[str, Any]) -> None:
    """Store the PLE table in three files of its rows, and its scales, if it has some, in two."""
    entry = manifest["tables"]["embed_tokens_per_layer"]
    content, rows = (bundle / "per_layer.table").read_bytes(), entry["rows"]
    (bundle / "per_layer.table").unlink()
    for name, ends in (("data", (5, rows // 2, rows)), ("scales", (1, rows))):
        if name not in entry:
            continue
        (place,) = entry[name]["parts"]
        groups = -(-entry["columns"] // entry["group_size"])
        row_bytes = (
            entry["row_bytes"] if name == "data" else groups * {"float16": 2, "float32": 4}[entry[name]["dtype"]]
        )
        start, parts = 0, []
        for number, end in enumerate(ends):
            begin = place["offset"] + start * row_bytes
            file = bundle / f"{name}.{number}.table"
            file.write_bytes(b"\xff" * 64 + content[begin : begin + (end - start) * row_bytes])
            parts.append({"file": file.name, "offset": 64, "rows": end - start})
            start = end
        entry[name]["parts"] = parts


def with_channels(bundle: Path, manifest: dict[str, Any]) -> None:
    """Let two more tokens begin and end calls of tools."""
    del bundle
    manifest["tokens"]["channels"] = {"thought": [11, 12], "tool_call": [13, 14]}


# Each feature of the format: what makes a bundle use it, and what makes one that must give the same tokens.
FEATURES: dict[str, tuple[Change, Change | None]] = {
    "untied-head": (with_own_head, None),
    "no-per-layer-embeddings": (without_per_layer, with_zero_per_layer),
    "split-tables": (with_split_tables, None),
    "kv-float16": (with_float16_cache, None),
    "kv-layout": (with_rows_first, None),
    "channels": (with_channels, None),
}


def _convert_cache(
    bundle: Path,
    manifest: dict[str, Any],
    dtype: int,
    reshaped: Callable[[list[Any]], list[Any]],
    into: dict[str, Any],
    back: dict[str, Any],
) -> None:
    """Put a node between each cache port of the graphs and what uses it; ports get another dtype and shape."""
    buffers = {entry["name"] for entry in manifest["kv"]["buffers"]}
    for graph in manifest["graphs"].values():
        model = onnx.load(bundle / graph["file"], load_external_data=False)
        nodes_in, nodes_out = [], []
        for port in [*model.graph.input, *model.graph.output]:
            is_output = port.name.removesuffix("_out") != port.name
            if port.name.removesuffix("_out") not in buffers:
                continue
            inner = f"{port.name}.inner"
            for node in model.graph.node:
                for names in (node.input, node.output):
                    names[:] = [inner if used == port.name else used for used in names]
            ends = (inner, port.name) if is_output else (port.name, inner)
            node = helper.make_node(inputs=[ends[0]], outputs=[ends[1]], **(back if is_output else into))
            (nodes_out if is_output else nodes_in).append(node)
            dims = [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
            port.CopyFrom(helper.make_tensor_value_info(port.name, dtype, reshaped(dims)))
        _prepend(model.graph, nodes_in)
        model.graph.node.extend(nodes_out)
        onnx.save(model, bundle / graph["file"])
        for way in ("inputs", "outputs"):
            for port in graph[way]:
                if port["name"].removesuffix("_out") in buffers:
                    port["shape"] = reshaped(port["shape"])
                    port["dtype"] = "float16" if dtype == TensorProto.FLOAT16 else "float32"


def _prepend(graph: Any, nodes: list[Any]) -> None:
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
