"""The bundle's manifest: the one contract between exporting and running. FORMAT.md specifies it in prose."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# Told what is being worked on and how many bytes of it were done.
Progress = Callable[[str, int], None]


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
    """A graph file and the names of its inputs and outputs, in order."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a runtime needs to run a bundle.

    `limits` are the largest sizes of the dimensions that vary, `files` sizes and digests by name, `raw` the whole
    document.
    """

    backend: str
    recipe: str
    vocab_size: int
    hidden_size: int
    max_seq_len: int
    default_draft_tokens: int
    max_draft_tokens: int
    limits: Mapping[str, int]
    bos: int
    eos: frozenset[int]
    kv: tuple[KVBuffer, ...]
    graphs: Mapping[str, Graph]
    files: Mapping[str, tuple[int, str]]
    raw: Mapping[str, Any]


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest and check that every file is there with its size.

    Raises:
        InputError: not a bundle, a newer format, a broken manifest, or an incomplete bundle.
    """
    path = bundle / MANIFEST
    if not path.exists():
        raise InputError(f"{bundle}: not a bundle, {MANIFEST} is missing; expected the output of `export`")
    raw = read_json(path, "the manifest of a bundle; export it again")
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; export it again")
    try:
        manifest = _parse(raw)
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: incomplete or malformed ({reason}); export the bundle again") from error
    for name, (size, _) in manifest.files.items():
        file = bundle / name
        if not file.is_file():
            raise InputError(f"{file}: named in {MANIFEST} but absent; the bundle is incomplete, copy it again")
        if (found := file.stat().st_size) != size:
            raise InputError(f"{file}: is {found} bytes, {MANIFEST} says {size}; copy the bundle again")
    for file in sorted(bundle.glob("*.weights")):
        if file.name not in manifest.files:
            raise InputError(f"{file}: not named in {MANIFEST}, so it cannot be checked; export the bundle again")
    return manifest


def changed_files(bundle: Path, manifest: Manifest, progress: Progress = lambda *_: None) -> list[str]:
    """Names of the files whose sha256 is not the manifest's."""
    return [name for name, (_, sha256) in manifest.files.items() if file_sha256(bundle / name, progress) != sha256]


def file_sha256(file: Path, progress: Progress = lambda *_: None) -> str:
    """Hex sha256 of a file, read block by block."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            progress(file.name, len(block))
    return digest.hexdigest()


def _parse(raw: Mapping[str, Any]) -> Manifest:
    fields = ("name", "layer", "layer_type", "num_key_value_heads", "head_dim")
    return Manifest(
        backend=raw["backend"]["name"],
        recipe=raw["recipe"],
        vocab_size=int(raw["target"]["vocab_size"]),
        hidden_size=int(raw["target"]["hidden_size"]),
        max_seq_len=int(raw["max_seq_len"]),
        default_draft_tokens=int(raw["num_draft_tokens"]["default"]),
        max_draft_tokens=int(raw["num_draft_tokens"]["max"]),
        limits={name: int(size) for name, size in raw["limits"].items()},
        bos=int(raw["tokens"]["bos"]),
        eos=frozenset(int(token) for token in raw["tokens"]["eos"]),
        kv=tuple(KVBuffer(**{key: buffer[key] for key in fields}) for buffer in raw["kv"]["buffers"]),
        graphs={
            name: Graph(graph["file"], *(tuple(port["name"] for port in graph[way]) for way in ("inputs", "outputs")))
            for name, graph in raw["graphs"].items()
        },
        files={name: (int(facts["size"]), str(facts["sha256"])) for name, facts in raw["files"].items()},
        raw=raw,
    )


def _check(manifest: Manifest) -> None:
    """Raise ValueError where the parts of a manifest do not fit each other."""
    if not 0 <= manifest.default_draft_tokens <= manifest.max_draft_tokens:
        raise ValueError("num_draft_tokens: default must be between 0 and max")
    if min(manifest.max_seq_len, manifest.vocab_size, manifest.hidden_size) < 1:
        raise ValueError("max_seq_len, vocab_size and hidden_size must be positive")
    if min(manifest.limits[name] for name in ("num_tokens", "num_outputs", "cache_rows")) < 1:
        raise ValueError("limits must be positive")
    if (
        manifest.limits["cache_rows"] < manifest.max_seq_len
        or manifest.limits["num_outputs"] <= manifest.max_draft_tokens
    ):
        raise ValueError("limits leave no room for max_seq_len or num_draft_tokens")
    for name in ("target", "drafter", "two_stage", "kv", "source"):
        if name not in manifest.raw:
            raise ValueError(f"{name} is missing")
    for name in manifest.files:
        if Path(name).name != name:
            raise ValueError(f"files names {name!r}, outside the bundle")
    for name in ("target", "drafter"):
        if manifest.graphs[name].file not in manifest.files:
            raise ValueError(f"the file of graph {name} is not in files")
    buffers = {kv.name for kv in manifest.kv}
    if not buffers or not buffers <= set(manifest.graphs["target"].inputs):
        raise ValueError("kv.buffers are not inputs of graph target")
    if min(min(kv.num_key_value_heads, kv.head_dim) for kv in manifest.kv) < 1:
        raise ValueError("kv.buffers must have positive sizes")
