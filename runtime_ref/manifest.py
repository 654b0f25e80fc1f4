"""The bundle's manifest: the one contract between exporting and running. FORMAT.md specifies it in prose."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class KVBuffer:
    """K or V of one storing layer: [num_key_value_heads, cache_rows, head_dim] float32."""

    name: str
    layer: int
    layer_type: str
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Graph:
    """A graph file and the names, dtypes and shapes of its inputs and outputs."""

    file: str
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Manifest:
    """What a runtime needs to run a bundle; `raw` is the whole document."""

    backend: str
    recipe: str
    vocab_size: int
    hidden_size: int
    max_seq_len: int
    default_draft_tokens: int
    max_draft_tokens: int
    bos: int | None
    eos: frozenset[int]
    kv: tuple[KVBuffer, ...]
    graphs: Mapping[str, Graph]
    files: Mapping[str, Mapping[str, Any]]
    raw: Mapping[str, Any]


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest and check that every file is there with its size.

    Raises:
        InputError: not a bundle, a newer format, a broken manifest, or an incomplete bundle.
    """
    path = bundle / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{bundle}: not a bundle, {MANIFEST} is missing; expected the output of `export`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); export the bundle again") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; export it again")
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: incomplete or malformed at {error}; export the bundle again") from error
    for name, facts in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path}: names {name!r}, a file outside the bundle; export the bundle again")
        file = bundle / name
        if not file.is_file():
            raise InputError(f"{file}: named in {MANIFEST} but absent; the bundle is incomplete, copy it again")
        if (size := file.stat().st_size) != facts["size"]:
            raise InputError(f"{file}: is {size} bytes, {MANIFEST} says {facts['size']}; copy the bundle again")
    return manifest


def changed_files(bundle: Path, manifest: Manifest, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Names of the files whose sha256 is not the manifest's; `progress` is called with the bytes read."""
    changed = []
    for name, facts in manifest.files.items():
        digest = hashlib.sha256()
        with (bundle / name).open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                progress(len(block))
        if digest.hexdigest() != facts["sha256"]:
            changed.append(name)
    return changed


def _parse(raw: Mapping[str, Any]) -> Manifest:
    return Manifest(
        backend=raw["backend"]["name"],
        recipe=raw["recipe"],
        vocab_size=raw["target"]["vocab_size"],
        hidden_size=raw["target"]["hidden_size"],
        max_seq_len=int(raw["max_seq_len"]),
        default_draft_tokens=int(raw["num_draft_tokens"]["default"]),
        max_draft_tokens=int(raw["num_draft_tokens"]["max"]),
        bos=raw["tokens"]["bos"],
        eos=frozenset(raw["tokens"]["eos"]),
        kv=tuple(KVBuffer(**buffer) for buffer in raw["kv"]["buffers"]),
        graphs={
            name: Graph(graph["file"], tuple(graph["inputs"]), tuple(graph["outputs"]))
            for name, graph in raw["graphs"].items()
        },
        files=raw["files"],
        raw=raw,
    )
