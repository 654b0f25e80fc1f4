"""What apps see of the Kotlin library is what its files say, documented, and readable for older compilers.

Run by `make android-test`, which compiles the library.
"""

import re
import subprocess

import pytest
from surface import ANDROID, MODULES, PARTS, file_of, surface


@pytest.mark.parametrize("module", MODULES)
def test_the_public_side_is_as_written(module: str) -> None:
    """If it was changed on purpose: `python android_demo/hosttest/surface.py`, and a line in CHANGELOG.md."""
    assert surface(module) == file_of(module).read_text()


@pytest.mark.parametrize("module", MODULES)
def test_no_class_of_a_library_behind_it_is_in_it(module: str) -> None:
    named = set(re.findall(r"\b(?:[a-z]\w*\.)+[A-Z]\w*", file_of(module).read_text()))
    expected = ("gemmamtp.", "java.", "kotlin.", "kotlinx.coroutines.", "android.content.Context")
    assert [name for name in sorted(named) if not name.startswith(expected)] == []


@pytest.mark.parametrize("module", MODULES)
def test_public_declarations_are_documented(module: str) -> None:
    undocumented = []
    for file in (ANDROID / module / "src/main").rglob("*.kt"):
        lines = file.read_text().splitlines()
        documented = set(re.findall(r"@property (\w+)", file.read_text()))
        for before, line in zip(["", *lines], lines, strict=False):
            declared = re.match(r" {0,4}public .*?\b(?:class|interface|object|fun|val|var)(?: <.*?>)? (\w+)", line)
            if declared is None or line.endswith(",") or declared[1] in documented:
                continue
            if not re.search(r"\*/$|^ *@", before):  # annotations stand between
                undocumented.append(f"{file.name}: {line.strip()}")
    assert undocumented == []


def test_kotlin_2_1_can_read_it() -> None:
    """A compiler reads metadata of the next language version, and no later ones."""
    command = ["javap", "-v", PARTS / "core/gemmamtp/core/Decoder.class"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"kotlin\.Metadata\(\s*mv=\[2,2,0\]", shown)
