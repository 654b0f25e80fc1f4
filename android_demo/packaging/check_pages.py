"""Check that native libraries load on phones with memory pages of 16 KB: `check_pages.py FILE...`: .apk, .aar or .so.

Google Play asks for it of apps for Android 15 and later. The segments of each 64-bit library must be aligned to 16 KB.
In an APK, one that is stored without compression must begin at a multiple of 16 KB. The exit status is 1 if not.
"""

import struct
import sys
import zipfile
from pathlib import Path

PAGE = 16 * 1024
PT_LOAD = 1
LOCAL_HEADER = 30  # bytes before the name in a zip file's entry


def load_alignments(library: bytes) -> list[int]:
    """Return the alignments of a library's loaded segments in bytes; none for one of 32 bits, which has 4 KB pages."""
    if library[:4] != b"\x7fELF":
        raise ValueError("expected an ELF file, found something else")
    is_64_bit, is_little = library[4] == 2, library[5] == 1
    if not is_64_bit or not is_little:
        return []
    (table,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", library, table + i * size) for i in range(count)]
    return [header[-1] for header in headers if header[0] == PT_LOAD]


def data_offset(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Return where an entry's data begin in the archive's file."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset)
    header = archive.fp.read(LOCAL_HEADER)
    name, extra = struct.unpack_from("<HH", header, 26)
    return entry.header_offset + LOCAL_HEADER + name + extra


def wrong(library: bytes, offset: int = 0) -> list[str]:
    """Return what is wrong with a library, that begins at an offset of an APK."""
    try:
        alignments = load_alignments(library)
    except (ValueError, struct.error) as error:
        return [f"not a library: {error}"]
    lines = []
    if low := [alignment for alignment in alignments if alignment % PAGE]:
        lines.append(
            f"segments are aligned to {min(low)} bytes, expected a multiple of {PAGE}; link with max-page-size"
        )
    if alignments and offset % PAGE:
        lines.append(f"begins at byte {offset}, expected a multiple of {PAGE}; use `zipalign -P 16`")
    return lines


def wrong_in(path: Path) -> tuple[int, list[str]]:
    """Return how many libraries a file has, and what is wrong with them, a line each."""
    if not zipfile.is_zipfile(path):
        return 1, [f"{path}: {line}" for line in wrong(path.read_bytes())]
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".so")]
        lines = []
        for entry in entries:
            mapped = path.suffix == ".apk" and entry.compress_type == zipfile.ZIP_STORED
            for line in wrong(archive.read(entry), data_offset(archive, entry) if mapped else 0):
                lines.append(f"{path}: {entry.filename}: {line}")
    return len(entries), lines


if __name__ == "__main__":
    results = [wrong_in(Path(argument)) for argument in sys.argv[1:]]
    faults = [line for _, lines in results for line in lines]
    print("\n".join(faults) or f"{sum(count for count, _ in results)} libraries fit pages of 16 KB")
    sys.exit(bool(faults))
