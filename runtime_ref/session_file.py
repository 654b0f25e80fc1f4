"""Session files: a conversation's tokens, keys and values on disk, as FORMAT.md specifies them.

They are safetensors files. They are written and read without a library, so that buffers can be mapped into memory.
"""

import contextlib
import errno
import glob
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime_ref.cache import CACHE_STEP_ROWS, Cache, allocate
from runtime_ref.errors import InputError
from runtime_ref.locks import locked
from runtime_ref.manifest import SLIDE_ROWS, KVBuffer, Manifest, round_up
from runtime_ref.requirements import FLOAT16, FLOAT32

FORMAT, VERSION = "gemma-mtp-session", 1
ALIGNMENT = 4096  # of the data, so that pages of the file are pages of the first buffer
MAX_HEADER_BYTES = 1 << 24
DTYPES = {FLOAT32: "F32", FLOAT16: "F16"}  # larger ones first: each tensor then begins at a multiple of its item size
TOKENS = "tokens"
AGAIN = "run the prompt again and save another session"
OTHER = f"choose another one, or {AGAIN}"


@dataclass(frozen=True)
class Session:
    """What a session file holds.

    Attributes:
        cache: the conversation's. After opening, its buffers are pages of the file, which change in memory alone.
        planner: what the planner had learned, as `DraftLength.as_dict` gives it.
        messages: those of a chat so far; None if none were saved.
    """

    cache: Cache
    planner: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]] | None = None


def save_session(file: Path, session: Session) -> None:
    """Write a session as a whole or not at all: aside, flushed to the disk, then renamed.

    Args:
        file: the file; an existing one is replaced. If it is a symbolic link, its destination is replaced.
        session: what to save. Rows that are not valid are saved as zeros.

    Raises:
        InputError: the file cannot be written, or the messages are not JSON.
    """
    cache = session.cache
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "bundle": cache.manifest.digest,
        "max_seq_len": str(cache.manifest.max_seq_len),
        "window_start": str(_start(cache)),
        "planner": json.dumps(session.planner),
    }
    if session.messages is not None:
        try:
            metadata["messages"] = json.dumps(list(session.messages), allow_nan=False)
            _messages(metadata["messages"])
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"messages of a session are not objects of JSON ({error}); leave out what is not"
            ) from error
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in _tensors(cache.manifest, cache.position, _start(cache)).items():
        begin, end = end, end + _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (round_up(8 + len(content), ALIGNMENT) - 8 - len(content))
    if len(content) > MAX_HEADER_BYTES:
        raise InputError(f"{file}: the messages take {len(content)} bytes, expected at most {MAX_HEADER_BYTES}")

    def write(stream: IO[bytes]) -> None:
        stream.write(len(content).to_bytes(8, "little") + content)
        for kv in _by_dtype(cache.manifest):
            stream.write(_saved_rows(cache, kv).data)
        stream.write(np.array(cache.tokens, "<i4").data)

    _write_whole(file, write)


def open_session(file: Path, manifest: Manifest) -> Session:
    """Open a session; its buffers are mapped into memory, so that it takes no longer for a large one.

    Args:
        file: a session file. It may be replaced while the session is open, and must not be changed in place.
        manifest: of the bundle that it was saved with.

    Raises:
        InputError: it is no session file, incomplete, malformed, of another version, or of another bundle.
    """
    content = _mapped(file)
    header, data, metadata = _checked_header(file, content)
    if metadata.get("bundle") != manifest.digest:
        raise InputError(
            f"{file}: was saved with another bundle, whose manifest has the sha256 {metadata.get('bundle')!r:.70},"
            f" expected {manifest.digest}; {AGAIN}"
        )
    try:
        cache = _read_cache(content, data, header, metadata["window_start"], manifest)
        planner = _json(metadata["planner"])
        messages = _messages(metadata["messages"]) if "messages" in metadata else None
        if not isinstance(planner, dict):
            raise ValueError("planner is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise malformed(file, error) from error
    return Session(cache, planner, messages)


def session_sizes(file: Path) -> dict[str, Any]:
    """Return what a session file says of itself, without its bundle: the JSON document of `inspect --json`.

    Args:
        file: a session file.

    Raises:
        InputError: it is no session file, malformed, or of another version.
    """
    content = _mapped(file)
    header, _, metadata = _checked_header(file, content)
    try:
        tokens, bundle = _count(header[TOKENS]["shape"][0]), metadata["bundle"]
        sizes = {"kind": "session", "digest": bundle, "tokens": tokens}
        if "max_seq_len" in metadata:
            sizes |= {"max_seq_len": int(metadata["max_seq_len"]), "tokens_left": int(metadata["max_seq_len"]) - tokens}
        if "messages" in metadata:
            sizes["messages"] = len(_messages(metadata["messages"]))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise malformed(file, error) from error
    return {**sizes, "total_bytes": len(content)}


def _checked_header(file: Path, content: mmap.mmap) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The entries of a session's tensors, where their data begins, and its metadata.

    Raises:
        InputError: it is no session file, or of another version.
    """
    try:
        header, data = _header(content)
        metadata = header.pop("__metadata__")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r:.40}, expected {FORMAT!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: not a session file ({_reason(error)}); {OTHER}") from error
    version = metadata.get("version")
    if version != str(VERSION):
        newer = version is not None and version.isdecimal() and len(version) < 9 and int(version) > VERSION
        raise InputError(
            f"{file}: version of its format is {version!r:.20}, this version reads '{VERSION}';"
            f" {'update it' if newer else AGAIN}"
        )
    return header, data, metadata


def malformed(file: Path, error: Exception) -> InputError:
    """Return the error of a session file that has the right format, version and bundle, and something wrong in it.

    Args:
        file: the session file.
        error: what is wrong.
    """
    return InputError(f"{file}: incomplete or malformed ({_reason(error)}); {AGAIN}")


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else f"{error}"


def _mapped(file: Path) -> mmap.mmap:
    """The file as memory of this process: changes stay in memory."""
    try:
        if not file.is_file():
            found = "is not a file" if file.exists() else "not found"
            raise InputError(f"{file}: {found}; expected a session that was saved")
        with file.open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) < 8:
                raise InputError(f"{file}: not a session file ({size} bytes, expected at least 8); {OTHER}")
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{file}: cannot be read ({reason}); expected a session that was saved") from error


def _header(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the data begins."""
    size = int.from_bytes(content[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"its header has {size} bytes of {len(content) - 8}, expected at most {MAX_HEADER_BYTES}")
    header = _json(content[8 : 8 + size].decode("utf-8"))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("its header is no object of objects")
    if not all(isinstance(value, str) for value in header["__metadata__"].values()):
        raise ValueError("its metadata are not texts")
    return header, 8 + size


def _messages(text: str) -> list[dict[str, Any]]:
    messages = _json(text)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages are no list of objects")
    return messages


def _json(text: str) -> Any:
    """Parse JSON strictly: without NaN, infinity, and keys that are there twice."""
    return json.loads(text, parse_constant=_refused, object_pairs_hook=_distinct)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r:.40} is there twice")
        result[key] = value
    return result


def _read_cache(content: mmap.mmap, data: int, header: Mapping[str, Any], start: str, manifest: Manifest) -> Cache:
    """Check the tensors against the manifest, and make a cache of them."""
    position = _length_of_tokens(header[TOKENS], manifest)
    cache = Cache(manifest)
    if not (start.isdecimal() and start.isascii() and len(start) < 10):
        raise ValueError(f"window_start is {start!r:.20}, expected a whole number")
    cache.window_start = int(start)
    room = manifest.limits["window_rows"]
    if cache.window_start % SLIDE_ROWS or not cache.can_resume(position) or position - cache.window_start > room:
        raise ValueError(f"window_start is {start}, which no conversation of {position} tokens has")
    expected = _tensors(manifest, position, cache.window_start)
    if header.keys() != expected.keys():
        name = min(header.keys() ^ expected.keys())
        raise ValueError(f"tensor {name!r:.40} is {'not expected' if name in header else 'missing'}")
    places = {}
    for name, (dtype, shape) in expected.items():
        begin, end = (_count(offset) for offset in header[name]["data_offsets"])
        found = header[name]["dtype"], [_count(size) for size in header[name]["shape"]]
        if found != (dtype, list(shape)) or end - begin != _num_bytes(dtype, shape):
            raise ValueError(f"tensor {name} is {found} of {end - begin} bytes, expected {dtype} {list(shape)}"[:200])
        places[name] = begin, end
    at = 0
    for begin, end in sorted(places.values()):
        if begin != at:
            raise ValueError(f"tensors leave out or share bytes from {min(begin, at)} on")
        at = end
    if len(content) != data + at:
        raise ValueError(f"the file has {len(content)} bytes, its header says {data + at}")
    tokens = np.frombuffer(content, "<i4", position, data + places[TOKENS][0]) if position else np.zeros(0, "<i4")
    if position and not 0 <= tokens.min() <= tokens.max() < manifest.vocab_size:
        raise ValueError(f"tokens has ids that are not between 0 and {manifest.vocab_size - 1}")
    cache.tokens = tokens.tolist()
    cache.buffers = {kv.name: _buffer(content, data + places[kv.name][0], kv, expected) for kv in manifest.kv}
    return cache


def _length_of_tokens(entry: Mapping[str, Any], manifest: Manifest) -> int:
    (length,) = entry["shape"]
    if not _count(length) <= manifest.max_seq_len:
        raise ValueError(f"there are {length} tokens, the bundle's context has {manifest.max_seq_len}")
    return length


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.20} is not a count")
    return value


def _buffer(content: mmap.mmap, offset: int, kv: KVBuffer, expected: Mapping[str, tuple[str, Sequence[int]]]) -> Any:
    shape = expected[kv.name][1]
    if 0 in shape:
        return allocate(kv, 0)
    if offset % np.dtype(kv.dtype).itemsize:
        raise ValueError(f"tensor {kv.name} begins at byte {offset}, expected a multiple of its item size")
    return np.frombuffer(content, kv.dtype, int(np.prod(shape)), offset).reshape(shape)


def _start(cache: Cache) -> int:
    return cache.window_start if cache.position else 0  # a text that begins anew begins at 0


def _tensors(manifest: Manifest, position: int, start: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of all tensors by name, in the order in which they are written."""
    tensors = {
        kv.name: (DTYPES[kv.dtype], kv.shape(_rows(manifest, kv, position, start))) for kv in _by_dtype(manifest)
    }
    return {**tensors, TOKENS: ("I32", (position,))}


def _by_dtype(manifest: Manifest) -> list[KVBuffer]:
    return sorted(manifest.kv, key=lambda kv: list(DTYPES).index(kv.dtype))


def _rows(manifest: Manifest, kv: KVBuffer, position: int, start: int) -> int:
    """The rows of a saved buffer: those in use, rounded up."""
    if kv.layer_type == "sliding_attention":
        return min(round_up(position - start, CACHE_STEP_ROWS), manifest.limits["window_rows"])
    return min(round_up(position, CACHE_STEP_ROWS), manifest.limits["cache_rows"])


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * (2 if dtype == DTYPES[FLOAT16] else 4)


def _saved_rows(cache: Cache, kv: KVBuffer) -> np.ndarray:
    """A buffer as it is saved: rows that are not valid hold whatever passes left there, and are zeros in the file."""
    start = _start(cache)
    used = cache.position - (start if kv.layer_type == "sliding_attention" else 0)
    saved = allocate(kv, _rows(cache.manifest, kv, cache.position, start))
    np.moveaxis(saved, kv.rows_axis, 0)[:used] = np.moveaxis(cache.buffers[kv.name], kv.rows_axis, 0)[:used]
    return saved


def _write_whole(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file aside, and rename it; what a killed process left there is removed before."""
    try:
        target = file.resolve()
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read only", str(target))
        prefix = f".{target.name}.partial-"
        with locked(target.with_name(f".{target.name}.lock")) as is_locked:
            for leftover in target.parent.glob(f"{glob.escape(prefix)}*") if is_locked else ():
                leftover.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=prefix, delete=False) as stream:
                aside = Path(stream.name)
                try:
                    write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                    stream.close()
                    aside.replace(target)
                finally:
                    with contextlib.suppress(OSError):
                        aside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{file}: the session cannot be written ({reason}); free some space, or choose another file"
        ) from error
