"""The graphs of the app's engines give bitwise the outputs and caches of runtime_ref's graphs.

Run by `make android-test`, which builds the engines and bundles; EngineCheck.kt runs the same passes.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest

BUILD = Path(__file__).parent.parent / "build"
BUNDLES = ("onnx-fp32", "onnx-int4", "executorch-fp32")


class Passes:
    """The passes of EngineCheck.kt; `parts` has the name and array of each output and cache buffer after each pass."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = read_manifest(bundle)
        engine = load_engine(bundle, self.manifest, 1)
        self.graphs, self.tables = engine.graphs, engine.tables
        self.parts: list[tuple[str, np.ndarray]] = []
        self.bind(128)
        _, _, states = self.target(0, [self.token(i) for i in range(96)], [95, 95])
        last, state = 7, states[:1]
        for _ in range(4):
            draft, state = self.drafter(96, last, state)
            last = int(draft[0])
        self.target(96, [self.token(i + 200) for i in range(6)], range(6))
        before = self.cache
        self.bind(256)
        for name, old in before.items():
            self.cache[name][:, :128] = old
        _, _, states = self.target(98, [self.token(i + 300) for i in range(4)], range(4))
        self.drafter(102, 9, states[3:])

    def token(self, i: int) -> int:
        return (i * 37 + 11) % self.manifest.vocab_size

    def bind(self, max_rows: int) -> None:
        self.cache: dict[str, np.ndarray] = {}
        for kv in self.manifest.kv:
            limit = self.manifest.limits["window_rows" if kv.layer_type == "sliding_attention" else "cache_rows"]
            self.cache[kv.name] = np.zeros((kv.num_key_value_heads, min(max_rows, limit), kv.head_dim), np.float32)
        for graph in self.graphs.values():
            graph.bind(self.cache)

    def target(self, position: int, ids: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        return self.run(
            "target",
            embedded=self.tables["embed_tokens"][ids],
            per_layer=self.tables["embed_tokens_per_layer"][ids],
            position=np.array([position]),
            window_start=np.array([0]),
            output_rows=np.array(rows),
        )

    def drafter(self, position: int, token: int, state: np.ndarray) -> list[np.ndarray]:
        return self.run(
            "drafter",
            embedded=self.tables["embed_tokens"][[token]],
            state=state,
            position=np.array([position]),
            window_start=np.array([0]),
        )

    def run(self, name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        # Copied, because ExecuTorch's next call overwrites them.
        outputs = [output.copy() for output in self.graphs[name].run(**inputs)]
        names = [out for out in self.manifest.graphs[name].outputs if out.removesuffix("_out") not in self.cache]
        self.parts += [(f"{name}: {output}", array) for output, array in zip(names, outputs, strict=True)]
        self.parts += [(f"{name}: {buffer}", array.copy()) for buffer, array in self.cache.items()]
        return outputs


def kotlin(bundle: Path, file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", BUILD / "engines", bundle, file], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", BUNDLES)
def test_every_pass_is_bitwise_the_same(name: str, tmp_path: Path) -> None:
    bundle = BUILD / f"bundle-{name}"
    file = tmp_path / "outputs"
    done = kotlin(bundle, file)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr  # the JVM warns about native code
    actual, start, wrong = file.read_bytes(), 0, []
    parts = Passes(bundle).parts
    for index, (part, array) in enumerate(parts):
        if actual[start : start + array.nbytes] != array.tobytes():
            wrong.append(f"{index} {part}")
        start += array.nbytes
    assert wrong == []
    assert start == len(actual)
    assert all(array.any() for part, array in parts if "key_" in part or "value_" in part)


@pytest.mark.parametrize(
    ("name", "file", "runtime"),
    [("onnx-int4", "target.onnx", "ONNX Runtime"), ("executorch-fp32", "model.pte", "ExecuTorch")],
)
def test_the_error_of_a_broken_graph_is_one_line(name: str, file: str, runtime: str, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(BUILD / f"bundle-{name}", bundle)
    content = bytearray((bundle / file).read_bytes())
    content[:4096] = bytes(4096)
    (bundle / file).write_bytes(content)
    done = kotlin(bundle, tmp_path / "outputs")
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if str(bundle) in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{bundle / file}: {runtime}")
    assert "cannot load it (" in lines[0]
