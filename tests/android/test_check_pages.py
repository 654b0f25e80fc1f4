"""The check of native libraries, on made-up ones that are wrong in one way each."""

import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "android_demo/packaging/check_pages.py"


def library(alignments: tuple[int, ...] = (65536, 16384), bits: int = 64) -> bytes:
    """An ELF file with a loaded segment for each alignment, and one that is not loaded, of 8 bytes."""
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, 183, 1, 0, 64, 0, 0, 64, 56, len(alignments) + 1, 0, 0, 0)
    segments = [(1, alignment) for alignment in alignments] + [(2, 8)]
    return header + b"".join(struct.pack("<IIQQQQQQ", kind, 5, 0, 0, 0, 0, 0, align) for kind, align in segments)


def apk(path: Path, content: bytes, stored: bool = True, aligned: bool = True) -> Path:
    """An APK with one library, which begins at 16384 if it is aligned, else at 8192."""
    name = "lib/arm64-v8a/libx.so"
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    entry.extra = struct.pack("<HH", 0xD935, (16384 if aligned else 8192) - 30 - len(name) - 4).ljust(4, b"\0")
    entry.extra += bytes((16384 if aligned else 8192) - 30 - len(name) - 4)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, content)
    return path


def checked(*files: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, *files], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_libraries_that_fit(tmp_path: Path) -> None:
    file = tmp_path / "libx.so"
    file.write_bytes(library())
    old = tmp_path / "libold.so"
    old.write_bytes(library((4096,), bits=32))
    files = [apk(tmp_path / "a.apk", library()), apk(tmp_path / "b.apk", library(), stored=False, aligned=False)]
    files.append(apk(tmp_path / "c.aar", library(), aligned=False))
    assert checked(file, old, *files) == (0, "5 libraries fit pages of 16 KB\n")


@pytest.mark.parametrize(
    ("content", "aligned", "line"),
    [
        (library((16384, 4096)), True, "segments are aligned to 4096 bytes, expected a multiple of 16384"),
        (library(), False, "begins at byte 8192, expected a multiple of 16384; use `zipalign -P 16`"),
        (b"no library", True, "not a library: expected an ELF file"),
        (library()[:100], True, "not a library: unpack_from requires"),
    ],
)
def test_those_that_do_not_are_named(content: bytes, aligned: bool, line: str, tmp_path: Path) -> None:
    file = apk(tmp_path / "a.apk", content, aligned=aligned)
    status, text = checked(file)
    assert status == 1
    assert text.startswith(f"{file}: lib/arm64-v8a/libx.so: {line}")
    assert text.count("\n") == 1
