"""The bundle's manifest, the contract between exporter and runtime. FORMAT.md specifies it in prose."""

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json_and_digest
from runtime_ref.manifest_form import FORM_2, FORM_3, check_form
from runtime_ref.manifest_versions import from_format_2
from runtime_ref.requirements import FLOAT16, FLOAT32, HEADS_FIRST, TABLES, refuse_unknown_features, required_features
from runtime_ref.sampling import Sampling

FORMAT_VERSION = 3  # written; older ones are read as well
MANIFEST = "manifest.json"
SAMPLING_KEYS = ("temperature", "top_k", "top_p")
KV_DTYPES = (FLOAT32, FLOAT16)
READ_BY_NAME = ("tokenizer.json", "chat_template.jinja")  # files that are read if they are there
# Inputs and outputs of each graph that are not cache buffers, in order. `per_layer` is there if the table of PLE is.
GRAPH_PORTS = {
    "target": (
        ("embedded", "per_layer", "position", "window_start", "output_rows"),
        ("top_logits", "top_ids", "state"),
    ),
    "drafter": (("embedded", "state", "position", "window_start"), ("draft_token", "next_state")),
}
MAX_BUFFER_VALUES = 1 << 36  # numbers in a cache buffer: larger ones cannot be meant
MAX_DRAFT_TOKENS = 1024  # in a round
EMBEDDING, PER_LAYER, HEAD = TABLES
ARM64_MACHINES = ("aarch64", "arm64")  # what `platform.machine` calls the processor
# Sliding layers' buffers move by these: kernels sum blocks of so many rows, which then stay the same blocks.
SLIDE_ROWS = 128

# Called with the name of the file or step in progress, and how many bytes or steps of it were done since the last call.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class KVBuffer:
    """Keys or values of one layer that stores them.

    Attributes:
        name: of the graphs' input; the output that updates it ends in `_out`.
        layer: index of the layer.
        layer_type: `full_attention` or `sliding_attention`.
        num_key_value_heads: N.
        head_dim: D.
        dtype: of its numbers, `float32` or `float16`.
        layout: names of its dimensions in order; `rows` is S, the others are attributes of this class.
    """

    name: str
    layer: int
    layer_type: str
    num_key_value_heads: int
    head_dim: int
    dtype: str = FLOAT32
    layout: tuple[str, ...] = tuple(HEADS_FIRST)

    @property
    def rows_axis(self) -> int:
        """Index of the dimension S."""
        return self.layout.index("rows")

    def shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of a buffer of so many rows."""
        sizes = {"num_key_value_heads": self.num_key_value_heads, "rows": rows, "head_dim": self.head_dim}
        return tuple(sizes[name] for name in self.layout)


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
        format_version: of the file. `raw` has the form of the current version.
        digest: hexadecimal sha256 of the file, which holds the digests of all others.
        backend: name of the backend that the graphs are for.
        min_runtime: the oldest version of the backend's library that runs the graphs; None where it is not known.
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
        repetition_penalty: the same of that rule; 1 is none.
        bos: id of the beginning-of-text token.
        eos: ids of the tokens that end a text.
        channels: ids of the tokens that begin and end a part of the text that is no answer, by the part's name.
        parts: what each channel has around its content, and how calls of tools are written, by the channel's name.
        names: texts of special tokens by the names under which chat templates know them.
        kv: cache buffers.
        graphs: by name, `target` and `drafter`.
        tables: entries by name, as `tables.Table` reads them: `EMBEDDING`, `PER_LAYER` unless the model has no PLE, and
            `HEAD` if the target's head is not the embedding.
        files: size in bytes and hexadecimal sha256 by file name.
        raw: the whole document.
    """

    format_version: int
    digest: str
    backend: str
    min_runtime: str | None
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
    repetition_penalty: float
    bos: int
    eos: frozenset[int]
    channels: Mapping[str, tuple[int, int]]
    parts: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]
    kv: tuple[KVBuffer, ...]
    graphs: Mapping[str, Graph]
    tables: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, tuple[int, str]]
    raw: Mapping[str, Any]


def read_manifest(bundle: Path, digest: str | None = None) -> Manifest:
    """Read a bundle's manifest and check that every file is there and has its size.

    Args:
        bundle: directory written by `export`.
        digest: hexadecimal sha256 that the manifest must have; None for any.

    Raises:
        InputError: the directory is no bundle, or its manifest has another digest, another format, a feature that this
            version does not know, or is malformed; a file is missing, or one that is read is not named in it.
    """
    path = bundle / MANIFEST
    if not path.exists():
        raise InputError(f"{bundle}: not a bundle, {MANIFEST} is missing; expected the output of `export`")
    raw, actual_digest = read_json_and_digest(path, "the manifest of a bundle; export it again")
    if digest is not None and digest.lower() != actual_digest:
        raise InputError(
            f"{path}: has the sha256 {actual_digest}, expected {digest}; this is not the bundle that was meant"
        )
    manifest = _read(path, raw, actual_digest)
    for name, (size, _) in manifest.files.items():
        file = bundle / name
        if not file.is_file():
            raise InputError(f"{file}: named in {MANIFEST} but absent; the bundle is incomplete, copy it again")
        if (actual := file.stat().st_size) != size:
            raise InputError(f"{file}: is {actual} bytes, {MANIFEST} says {size}; copy the bundle again")
    for file in sorted(bundle.iterdir()):
        if (file.suffix == ".weights" or file.name in READ_BY_NAME) and file.name not in manifest.files:
            raise InputError(f"{file}: not named in {MANIFEST}, so it cannot be checked; export the bundle again")
    return manifest


def _read(path: Path, raw: Any, digest: str) -> Manifest:
    """Read a parsed manifest of any format, and check it."""
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version not in (2, FORMAT_VERSION):
        remedy = "update it" if isinstance(version, int) and version > FORMAT_VERSION else "export the bundle again"
        raise InputError(
            f"{path}: format_version is {version!r:.20}, this version reads 2 and {FORMAT_VERSION}; {remedy}"
        )
    if version == FORMAT_VERSION:
        refuse_unknown_features(path, raw)
    try:
        check_form(raw, FORM_2 if version == 2 else FORM_3, "")
        manifest = _parse(from_format_2(raw) if version == 2 else raw, version, digest)
        _check(manifest)
    except ValueError as error:
        raise InputError(f"{path}: incomplete or malformed ({error}); export the bundle again") from error
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


def _parse(raw: Mapping[str, Any], format_version: int, digest: str) -> Manifest:
    return Manifest(
        format_version=format_version,
        digest=digest,
        backend=raw["backend"]["name"],
        min_runtime=raw["backend"].get("min_runtime"),
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
        repetition_penalty=float((raw.get("sampling") or {}).get("repetition_penalty", 1)),
        bos=raw["tokens"]["bos"],
        eos=frozenset(raw["tokens"]["eos"]),
        channels={name: (ids[0], ids[1]) for name, ids in raw["tokens"].get("channels", {}).items()},
        parts=raw["tokens"].get("parts", {}),
        names=raw["tokens"].get("names", {}),
        kv=tuple(_buffer(entry) for entry in raw["kv"]["buffers"]),
        graphs={
            name: Graph(graph["file"], *(tuple(port["name"] for port in graph[way]) for way in ("inputs", "outputs")))
            for name, graph in raw["graphs"].items()
            if name in GRAPH_PORTS
        },
        tables={name: raw["tables"][name] for name in TABLES if name in raw["tables"]},
        files={name: (file["size"], file["sha256"]) for name, file in raw["files"].items()},
        raw=raw,
    )


def _row_multiple(raw: Mapping[str, Any]) -> int:
    """Processors' kernels differ in the multiples of rows that they compute in the same way."""
    arm64 = "row_multiple_arm64"
    multiple: int = raw[arm64 if arm64 in raw and platform.machine().lower() in ARM64_MACHINES else "row_multiple"]
    return multiple


def _buffer(entry: Mapping[str, Any]) -> KVBuffer:
    values = {field.name: entry[field.name] for field in fields(KVBuffer)}
    if entry["dtype"] not in KV_DTYPES or sorted(entry["layout"]) != sorted(HEADS_FIRST):
        raise ValueError(
            f"kv buffer {entry['name']} is {entry['dtype']} {entry['layout']}, expected {' or '.join(KV_DTYPES)} and an"
            f" order of {', '.join(HEADS_FIRST)}"
        )
    return KVBuffer(**{**values, "layout": tuple(entry["layout"])})


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
    for name, table in manifest.tables.items():
        for part in (table[part] for part in ("data", "scales") if part in table):
            if any(place["file"] not in manifest.files for place in part["parts"]):
                raise ValueError(f"the file of table {name} is not in files")
            rows = [place["rows"] for place in part["parts"]]
            if 0 in rows or sum(rows) != table["rows"]:
                raise ValueError(f"the parts of table {name} do not have its rows")
        if table["rows"] != manifest.vocab_size:
            raise ValueError(f"table {name} does not have a row for each token")
        if name != PER_LAYER and table["columns"] != manifest.hidden_size:
            raise ValueError(f"table {name} is not as wide as hidden_size")
    missing = {feature["name"] for feature in required_features(manifest.raw)}
    if missing := missing - {feature["name"] for feature in manifest.raw["requires"]}:
        raise ValueError(f"requires does not name {min(missing)}, which the manifest uses")
    buffers = [kv.name for kv in manifest.kv]
    for name, (inputs, outputs) in GRAPH_PORTS.items():
        graph = manifest.graphs[name]
        inputs = tuple(port for port in inputs if port != "per_layer" or PER_LAYER in manifest.tables)
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
