"""The text the built-in pair learns from: the documentation that every Python installation carries."""

import ast
import inspect
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_SHARE = 50  # one document in so many is never trained on


def documents() -> tuple[list[str], list[str]]:
    """Documentation strings of the standard library and pydoc's topics, as (training, held-out) documents."""
    found = {text.strip() for text in topics.values()}
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            found.update(_docstrings(path))
    ordered = sorted(text for text in found if len(text) >= 40)
    held_out = [text for text in ordered if zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0]
    kept = set(held_out)
    return [text for text in ordered if text not in kept], held_out


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a file that is a test of the parser itself
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(f"{node.name}({ast.unparse(node.args)})\n{inspect.cleandoc(text)}")
            elif text:
                found.append(inspect.cleandoc(text))
    return found
