"""The bundle's manifest, the contract between exporter and runtime. FORMAT.md specifies it in prose."""

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json
from runtime_ref.manifest_form import MANIFEST_FORM, check_form
from runtime_ref.sampling import Sampling

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SAMPLING_KEYS = ("temperature", "top_k", "top_p")
# Inputs and outputs of each graph that are not cache buffers, in order.
GRAPH_PORTS = {
    "target": (
        ("embedded", "per_layer", "position", "window_start", "output_rows"),
        ("top_logits", "top_ids", "state"),
    ),
    "drafter": (("embedded", "state", "position", "window_start"), ("draft_token", "next_state")),
}
MAX_BUFFER_VALUES = 1 << 36  # numbers in a cache buffer: larger ones cannot be meant
MAX_DRAFT_TOKENS = 1024  # in a round
TABLES = ("embed_tokens", "embed_tokens_per_layer")
ARM64_MACHINES = ("aarch64", "arm64")  # what `platform.machine` calls the processor
# Sliding layers' buffers move by these: kernels sum blocks of so many rows, which then stay the same blocks.
SLIDE_ROWS = 128

# Called with the name of the file or step in progress, and how many bytes or steps of it were done since the last call.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class KVBuffer:
    """Keys or values of one layer that stores them: [N, S, D] float32.

    Attributes:
        name: of the graphs' input; the output that updates it ends in `_out`.
        layer: index of the layer.
        layer_type: `full_attention` or `sliding_attention`.
        num_key_value_heads: N.
        head_dim: D.
    """

    name: str
    layer: int
    layer_type: str
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Graph:
    """A graph.

    Attributes:
        file: name of its file in the bundle.
        inputs: names of its inputs, in order.
        outputs: names of its outputs, in order.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a runtime needs to run a bundle.

    Attributes:
        backend: name of the backend that the graphs are for.
        recipe: name of the quantization recipe.
        vocab_size: V.
        hidden_size: E of the target.
        sliding_window: how many positions a sliding layer attends to.
        max_seq_len: tokens of prompt and answer together.
        default_draft_tokens: K if the user does not choose one.
        max_draft_tokens: the largest K.
        limits: largest sizes of the dimensions that vary: `num_tokens` (T), `num_outputs` (R), `cache_rows` and
            `window_rows` (S of full and sliding layers).
        row_multiple: T and R are padded to a multiple of this.
        sampling: how tokens are chosen if the user does not say.
        bos: id of the beginning-of-text token.
        eos: ids of the tokens that end a text.
        thoughts: ids of the tokens that begin and end a thought, which is no part of an answer; None without thoughts.
        names: texts of special tokens by the names under which chat templates know them.
        kv: cache buffers.
        graphs: by name, `target` and `drafter`.
        tables: entries of the embedding tables by name, as `tables.Table` reads them.
        files: size in bytes and hexadecimal sha256 by file name.
        raw: the whole document.
    """

    backend: str
    recipe: str
    vocab_size: int
    hidden_size: int
    sliding_window: int
    max_seq_len: int
    default_draft_tokens: int
    max_draft_tokens: int
    limits: Mapping[str, int]
    row_multiple: int
    sampling: Sampling
    bos: int
    eos: frozenset[int]
    thoughts: tuple[int, int] | None
    names: Mapping[str, str]
    kv: tuple[KVBuffer, ...]
    graphs: Mapping[str, Graph]
    tables: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, tuple[int, str]]
    raw: Mapping[str, Any]


def read_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest and check that every file is there and has its size.

    Args:
        bundle: directory written by `export`.

    Raises:
        InputError: the directory is no bundle, has another format, a malformed manifest or weights that the
            manifest does not name, or lacks a file.
    """
    path = bundle / MANIFEST
    if not path.exists():
        raise InputError(f"{bundle}: not a bundle, {MANIFEST} is missing; expected the output of `export`")
    raw = read_json(path, "the manifest of a bundle; export it again")
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; export it again")
    try:
        check_form(raw, MANIFEST_FORM, "")
        manifest = _parse(raw)
        _check(manifest)
    except ValueError as error:
        raise InputError(f"{path}: incomplete or malformed ({error}); export the bundle again") from error
    for name, (size, _) in manifest.files.items():
        file = bundle / name
        if not file.is_file():
            raise InputError(f"{file}: named in {MANIFEST} but absent; the bundle is incomplete, copy it again")
        if (actual := file.stat().st_size) != size:
            raise InputError(f"{file}: is {actual} bytes, {MANIFEST} says {size}; copy the bundle again")
    for file in sorted(bundle.glob("*.weights")):
        if file.name not in manifest.files:
            raise InputError(f"{file}: not named in {MANIFEST}, so it cannot be checked; export the bundle again")
    return manifest


def changed_files(bundle: Path, manifest: Manifest, progress: Progress = lambda *_: None) -> list[str]:
    """Return names of the files whose sha256 is not the manifest's.

    Args:
        bundle: directory of the bundle.
        manifest: the bundle's.
        progress: called with the name of a file and the number of its bytes that were read since the last call.
    """
    return [name for name, (_, sha256) in manifest.files.items() if file_sha256(bundle / name, progress) != sha256]


def file_sha256(file: Path, progress: Progress = lambda *_: None) -> str:
    """Return the hexadecimal sha256 of a file, which is read in blocks.

    Args:
        file: the file.
        progress: called with its name and the number of bytes that were read since the last call.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            progress(file.name, len(block))
    return digest.hexdigest()


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `count`; both are positive."""
    return -(-count // multiple) * multiple


def window_rows(sliding_window: int, num_tokens: int) -> int:
    """Return the rows of a sliding layer's buffer: those that a pass attends to and writes, and those of one move.

    Args:
        sliding_window: how many positions a sliding layer attends to; the drafter attends to one more.
        num_tokens: the largest T of a pass.
    """
    return round_up(sliding_window + 2 + num_tokens + SLIDE_ROWS, SLIDE_ROWS)


def _parse(raw: Mapping[str, Any]) -> Manifest:
    fields = ("name", "layer", "layer_type", "num_key_value_heads", "head_dim")
    return Manifest(
        backend=raw["backend"]["name"],
        recipe=raw["recipe"],
        vocab_size=raw["target"]["vocab_size"],
        hidden_size=raw["target"]["hidden_size"],
        sliding_window=raw["target"]["sliding_window"],
        max_seq_len=raw["max_seq_len"],
        default_draft_tokens=raw["num_draft_tokens"]["default"],
        max_draft_tokens=raw["num_draft_tokens"]["max"],
        limits=raw["limits"],
        row_multiple=_row_multiple(raw),
        sampling=_sampling(raw.get("sampling")),
        bos=raw["tokens"]["bos"],
        eos=frozenset(raw["tokens"]["eos"]),
        thoughts=_thoughts(raw["tokens"].get("thoughts")),
        names=raw["tokens"].get("names", {}),
        kv=tuple(KVBuffer(**{key: buffer[key] for key in fields}) for buffer in raw["kv"]["buffers"]),
        graphs={
            name: Graph(graph["file"], *(tuple(port["name"] for port in graph[way]) for way in ("inputs", "outputs")))
            for name, graph in raw["graphs"].items()
            if name in GRAPH_PORTS
        },
        tables=raw["tables"],
        files={name: (file["size"], file["sha256"]) for name, file in raw["files"].items()},
        raw=raw,
    )


def _row_multiple(raw: Mapping[str, Any]) -> int:
    """Processors' kernels differ in the multiples of rows that they compute in the same way."""
    arm64 = "row_multiple_arm64"
    multiple: int = raw[arm64 if arm64 in raw and platform.machine().lower() in ARM64_MACHINES else "row_multiple"]
    return multiple


def _thoughts(marks: list[int] | None) -> tuple[int, int] | None:
    if marks is None:
        return None
    if len(marks) != 2:
        raise ValueError(f"tokens.thoughts is {marks}, expected two token ids")
    return marks[0], marks[1]


def _sampling(entry: Mapping[str, Any] | None) -> Sampling:
    """The checkpoint's recommendation; greedy for a bundle without one."""
    try:
        return Sampling() if entry is None else Sampling(**{key: entry[key] for key in SAMPLING_KEYS})
    except InputError as error:
        raise ValueError(str(error)) from error


def _check(manifest: Manifest) -> None:
    """Check that the parts of a manifest fit each other.

    Raises:
        ValueError: they do not.
    """
    if not 0 <= manifest.default_draft_tokens <= manifest.max_draft_tokens:
        raise ValueError("num_draft_tokens: default must be between 0 and max")
    if min(manifest.max_seq_len, manifest.vocab_size, manifest.hidden_size, manifest.sliding_window) < 1:
        raise ValueError("max_seq_len, vocab_size, hidden_size and sliding_window must be positive")
    limits, multiple = manifest.limits, manifest.row_multiple
    if min(*(limits[name] for name in ("num_tokens", "num_outputs", "cache_rows", "window_rows")), multiple) < 1:
        raise ValueError("limits and row_multiple must be positive")
    room = min(limits["num_tokens"], limits["num_outputs"])
    if limits["cache_rows"] < manifest.max_seq_len + multiple - 1 or room <= manifest.max_draft_tokens:
        raise ValueError("limits leave no room for max_seq_len or num_draft_tokens")
    if limits["window_rows"] < min(limits["cache_rows"], window_rows(manifest.sliding_window, limits["num_tokens"])):
        raise ValueError("limits leave no room for sliding_window")
    if limits["num_tokens"] % multiple or limits["num_outputs"] % multiple:
        raise ValueError("limits are not multiples of row_multiple")
    for name in manifest.files:
        if Path(name).name != name:
            raise ValueError(f"files names {name!r}, outside the bundle")
    for name in ("target", "drafter"):
        if manifest.graphs[name].file not in manifest.files:
            raise ValueError(f"the file of graph {name} is not in files")
    for name in TABLES:
        places = [manifest.tables[name][part] for part in ("data", "scales") if part in manifest.tables[name]]
        if any(place["file"] not in manifest.files for place in places):
            raise ValueError(f"the file of table {name} is not in files")
        if manifest.tables[name]["rows"] != manifest.vocab_size:
            raise ValueError(f"table {name} does not have a row for each token")
    if manifest.tables["embed_tokens"]["columns"] != manifest.hidden_size:
        raise ValueError("table embed_tokens is not as wide as hidden_size")
    buffers = [kv.name for kv in manifest.kv]
    for name, (inputs, outputs) in GRAPH_PORTS.items():
        graph = manifest.graphs[name]
        others = [port for port in graph.inputs if port not in buffers]
        results = [port for port in graph.outputs if port.removesuffix("_out") not in buffers]
        if (*others,) != inputs or (*results,) != outputs:
            raise ValueError(
                f"graph {name} has other inputs or outputs than {', '.join((*inputs, *outputs))} and kv.buffers"
            )
        if any(len({*ports}) < len(ports) for ports in (graph.inputs, graph.outputs)):
            raise ValueError(f"graph {name} has two inputs or outputs of one name")
    if not buffers or sorted(buffers) != sorted({*manifest.graphs["target"].inputs} & {*buffers}):
        raise ValueError("kv.buffers are not inputs of graph target, or one is there twice")
    sizes = [kv.num_key_value_heads * kv.head_dim for kv in manifest.kv]
    if min(sizes) < 1 or max(sizes) * max(limits["cache_rows"], limits["window_rows"]) >= MAX_BUFFER_VALUES:
        raise ValueError("kv.buffers must have positive sizes that fit into memory")
    if manifest.max_draft_tokens > MAX_DRAFT_TOKENS:
        raise ValueError(f"num_draft_tokens.max is {manifest.max_draft_tokens}, expected at most {MAX_DRAFT_TOKENS}")
