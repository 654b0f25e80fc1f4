"""Check a bundle's files against its manifest, and those again that may have changed since they were checked."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path

from runtime_ref.device_folder import device_folder, write_whole
from runtime_ref.errors import InputError
from runtime_ref.json_file import read_json
from runtime_ref.manifest import Manifest, Progress, file_sha256

log = logging.getLogger(__name__)

RECORD = "checked-files.json"
RECORD_VERSION = 1
# A file that was written so shortly before it is read may be written again with the same times: clocks have steps.
SETTLED_NANOSECONDS = 2_000_000_000


def first_changed_file(
    bundle: Path, manifest: Manifest, progress: Progress = lambda *_: None, verify: bool = False
) -> str | None:
    """Return the name of a file whose sha256 is not the manifest's; None if all have theirs.

    A file is not read if it was found right before, and its size, its times of change, and its place on the disk are
    those that it had then. What was found is kept in the device's folder, as far as it can be written.

    Args:
        bundle: directory of the bundle.
        manifest: the bundle's.
        progress: called with the name of a file and the number of its bytes that were checked since the last call.
        verify: whether to read every file.
    """
    record = {} if verify else _recorded(bundle, manifest)
    found, now = {}, time.time_ns()
    for name, (size, sha256) in manifest.files.items():
        if name not in record:
            _flush(bundle / name)
        state = _state(bundle / name)
        if record.get(name) == state:
            progress(name, size)
        elif file_sha256(bundle / name, progress) != sha256:
            return name
        # Also not while it changed: then it has another state now.
        if _state(bundle / name) == state and max(state[1:3]) < now - SETTLED_NANOSECONDS:
            found[name] = state
    if found != record:
        _keep(bundle, manifest, found)
    return None


def _flush(file: Path) -> None:
    """Write a file's changes in memory to the disk: until then, programs that map it change it at the same times."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        os.fsync(stream.fileno())


def _state(file: Path) -> list[int]:
    """What differs after a file was changed or copied: size, times in nanoseconds, and the place on the disk."""
    stat = file.stat()
    # The time of the last change of anything, ctime, cannot be set by programs that restore the other.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _recorded(bundle: Path, manifest: Manifest) -> dict[str, list[int]]:
    """States of files that were found right; none if the record is missing, damaged, or another bundle's."""
    try:
        document = read_json(device_folder(bundle) / RECORD, "a record of checked files")
        if document["version"] == RECORD_VERSION and document["bundle"] == manifest.digest:
            return dict(document["files"])
    except (InputError, KeyError, TypeError, ValueError):
        pass
    return {}


def _keep(bundle: Path, manifest: Manifest, found: dict[str, list[int]]) -> None:
    document = {"version": RECORD_VERSION, "bundle": manifest.digest, "files": found}
    folder = device_folder(bundle)
    try:
        folder.mkdir(exist_ok=True)
        write_whole(folder / RECORD, json.dumps(document))
    except OSError as error:  # a place that is read only: files are read again next time
        log.info("checked files are not recorded: %s: %s", error.filename, error.strerror)
