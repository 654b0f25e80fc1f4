"""The text that the built-in pair is trained on: the documentation inside every Python installation."""

import ast
import inspect
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_ONE_IN = 50  # one document in 50 is not trained on
MIN_DOCUMENT_CHARACTERS = 40


def documents() -> tuple[list[str], list[str]]:
    """Collect the documentation strings of the standard library and pydoc's topics.

    Returns:
        Training documents and held-out documents, each without duplicates and in alphabetical order. They depend on
        the installed version of Python.
    """
    texts = {text.strip() for text in topics.values()}
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            texts.update(_docstrings(path))
    ordered = sorted(text for text in texts if len(text) >= MIN_DOCUMENT_CHARACTERS)
    training = [text for text in ordered if not _is_held_out(text)]
    held_out = [text for text in ordered if _is_held_out(text)]
    return training, held_out


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def _docstrings(path: Path) -> list[str]:
    """Docstrings in a source file; those of functions follow a line with the function's name and arguments."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # some files are deliberately broken, to test the parser
        return []
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(f"{node.name}({ast.unparse(node.args)})\n{inspect.cleandoc(text)}")
            elif text:
                texts.append(inspect.cleandoc(text))
    return texts
