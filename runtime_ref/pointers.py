"""Recognise what stands where a file's content should be: pointers of version control, links whose file is gone."""

from pathlib import Path

# How files begin that only stand for a content elsewhere: what they are, and how the content is had.
POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("a pointer of Git LFS", "run `git lfs pull`"),
    b"# xet version": ("a pointer of Xet", "download the file itself"),
    b"/annex/objects/": ("a pointer of git-annex", "run `git annex get`"),
    b"<!doctype html": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


def is_present(path: Path) -> bool:
    """Return whether there is anything of this name, be it a link whose file is gone."""
    return path.exists() or path.is_symlink()


def what_stands_for(path: Path) -> str | None:
    """Return what stands in a file's place and what to do, as the end of a message; None if it may be the file itself.

    Args:
        path: the file, which need not exist.
    """
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is gone; download the file again"
    try:
        with path.open("rb") as stream:
            begin = stream.read(64).lstrip().lower()
    except OSError:
        return None
    if not begin:
        return "an empty file; write or download it again"
    return next((f"{what}; {remedy}" for start, (what, remedy) in POINTERS.items() if begin.startswith(start)), None)
