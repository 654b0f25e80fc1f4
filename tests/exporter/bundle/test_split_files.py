"""Weights in several files of a bounded size: `export --max-file-size`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.graphs.split_files import split_path
from exporter.graphs.tables import differing_rows, outside_tables, write_table
from exporter.parity.stages import run_parity
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, PER_LAYER, read_manifest
from runtime_ref.stats import Stats
from runtime_ref.tables import Table
from tests.exports import MAX_SEQ_LEN

Directories = tuple[Path, Path]
MAX_BYTES = {"fp32": 1_600_000, "int4": 300_000}  # the largest weights just fit


@pytest.mark.parametrize("recipe", MAX_BYTES)
def test_a_split_bundle_is_the_same_model(
    recipe: str, bundle: Callable[..., Path], pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    pair, split, max_bytes = open_pair(*pair_dirs("demo")), tmp_path / "split", MAX_BYTES[recipe]
    digest = export_bundle(pair, split, ExportOptions("onnx", RECIPES[recipe], MAX_SEQ_LEN, max_file_bytes=max_bytes))
    assert {"target.weights", "target.1.weights", "per_layer.table"} <= {file.name for file in split.iterdir()}
    assert max(file.stat().st_size for file in split.iterdir()) <= max_bytes
    tokens = [
        list(generate(open_engine(b, 1, digest=d), [3, 1, 4], Options(30, 3), Stats()))
        for b, d in ((split, digest), (bundle("demo", recipe=recipe), None))
    ]
    assert tokens[0] == tokens[1]
    checks = run_parity(split, pair, [[3, 1, 4, 1, 5]], 8)
    assert [check for check in checks if not check.passed] == []
    assert {*json.loads((split / MANIFEST).read_text())["files"], MANIFEST} == {file.name for file in split.iterdir()}


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_rows_of_a_split_table(
    recipe: str, bundle: Callable[..., Path], pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    """And a change in any of its files is seen."""
    table = outside_tables(open_pair(*pair_dirs("e2b")), RECIPES[recipe])[PER_LAYER]
    entry = write_table(tmp_path, table, 3000, lambda *_: None)
    files = {part["file"] for name in entry.keys() & {"data", "scales"} for part in entry[name]["parts"]}
    assert len(files) > 3
    assert files == {file.name for file in tmp_path.iterdir()}
    assert max(file.stat().st_size for file in tmp_path.iterdir()) <= 3000
    whole = Table(bundle("e2b", recipe=recipe), read_manifest(bundle("e2b", recipe=recipe)).tables[PER_LAYER])
    np.testing.assert_array_equal(Table(tmp_path, entry)[range(256)], whole[range(256)])

    first, last = tmp_path / "per_layer.table", tmp_path / f"per_layer.{len(files) - 1}.table"
    assert differing_rows(first, table) == []
    content = last.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], content + b"\0"):
        last.write_bytes(changed)
        assert len(differing_rows(first, table)) == 1
    last.unlink()
    assert len(differing_rows(first, table)) == 1


@pytest.mark.parametrize("backend", ["onnx", pytest.param("executorch", id="for executorch")])
def test_what_must_lie_in_one_file_is_checked_first(
    backend: str, pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    options = ExportOptions(backend, RECIPES["fp32"], MAX_SEQ_LEN, max_file_bytes=60000)
    name = r"embed_tokens.weight" if backend == "onnx" else "model.pte"
    with pytest.raises(InputError, match=rf"--max-file-size is 60000, but {name} needs at least \d+ bytes in one file"):
        export_bundle(open_pair(*pair_dirs("e2b")), tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_large_after_all_is_refused(pair_dirs: Callable[[str], Directories], tmp_path: Path) -> None:
    """Estimates are of weights, and here a graph is larger."""
    options = ExportOptions("onnx", RECIPES["fp32"], MAX_SEQ_LEN, max_file_bytes=70000)
    with pytest.raises(InputError, match=r"--max-file-size is 70000, but target.onnx needs at least \d+ bytes"):
        export_bundle(open_pair(*pair_dirs("e2b")), tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_names_of_continuations() -> None:
    assert [split_path(Path("a/t.weights"), i).name for i in range(3)] == ["t.weights", "t.1.weights", "t.2.weights"]
