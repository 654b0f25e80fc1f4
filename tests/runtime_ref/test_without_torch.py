"""runtime_ref runs an ONNX bundle with numpy, tokenizers and onnxruntime alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = """
import builtins, sys
allowed = {"numpy", "tokenizers", "onnxruntime", "runtime_ref"} | set(sys.stdlib_module_names)
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("runtime_ref") and level == 0:
        assert name.partition(".")[0] in allowed, f"{importer} imports {name}"
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
from pathlib import Path
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer
engine = open_engine(Path(sys.argv[1]), threads=1)
tokenizer = TextTokenizer(Path(sys.argv[1]), engine.manifest)
print(len(list(generate(engine, tokenizer.encode("Return"), Options(6, 2), Stats()))))
heavy = {"torch", "transformers", "sklearn", "exporter", "clustering", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""


def test_runs_a_bundle_without_torch(bundle: Callable[[str], Path]) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT, bundle("demo")], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "6"), result.stderr
