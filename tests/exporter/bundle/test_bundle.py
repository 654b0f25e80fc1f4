"""Bundles: exports are reproducible and written as a whole or not at all, and changed bundles are refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.bundle.export import ExportOptions, check_output, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.graphs.onnx import stored_weights
from exporter.graphs.spec import size_limits
from exporter.parity.stages import run_parity
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, read_manifest
from runtime_ref.stats import Stats
from tests.conftest import Run
from tests.exports import MAX_SEQ_LEN
from tests.kept import kept_bundle

Directories = tuple[Path, Path]
# Each way of breaking an export has a process of its own, forked from one that has imported everything.
SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
from exporter.bundle import export
from exporter.cli.main import main
from exporter.graphs import onnx
from tests.kept import keeping_traces
target, drafter, directory, traces = sys.argv[1:]
onnx.trace_graph = keeping_traces(onnx.trace_graph, Path(traces))
real = export.export_bundle
def broken(how):
    def stop(step, written):
        if written and how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        elif written:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
    export.export_bundle = lambda pair, out, options, progress: real(pair, out, options, stop)
    os.dup2(os.open(f"{directory}/{how}.err", os.O_CREAT | os.O_WRONLY), 2)
    output = f"{directory}/{how}/bundle"
    sys.argv = ["x", "export", "--target", target, "--drafter", drafter, "--output", output, "--recipe", "fp32"]
    main()
for how in ("full", "kill", "stop"):
    os.mkdir(f"{directory}/{how}")
    if not (child := os.fork()):
        code = 0
        try:
            broken(how)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(how, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
AGAIN = """
import sys
from pathlib import Path
from tests.exports import export
export(*map(Path, sys.argv[1:]), "onnx")
"""


@pytest.fixture
def copy(bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle("dense"), tmp_path / "copy"))


def test_second_export_is_byte_identical(
    bundle: Callable[[str], Path], pair_dirs: Callable[[str], Directories], request: pytest.FixtureRequest
) -> None:
    """Trace and export again in another process, with another hash seed. It depends on what the first one does."""

    def again(path: Path) -> None:
        command = [sys.executable, "-c", AGAIN, str(path), *map(str, pair_dirs("tiny"))]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})

    kept = kept_bundle(request.config.cache.mkdir("bundles"), again, *pair_dirs("tiny"), AGAIN)
    first, second = ({f.name: f.read_bytes() for f in d.iterdir()} for d in (bundle("tiny"), kept))
    assert first == second


def test_the_command_writes_the_same_bytes(
    bundle: Callable[[str], Path], pair_dirs: Callable[[str], Directories], run: Run, tmp_path: Path
) -> None:
    target, drafter = pair_dirs("tiny")
    options = "--max-seq-len", MAX_SEQ_LEN, "--recipe", "fp32", "--json"
    code, out, err = run("export", "--target", target, "--drafter", drafter, "--output", tmp_path / "again", *options)
    assert code == 0, err
    first, again = ({f.name: f.read_bytes() for f in d.iterdir()} for d in (bundle("tiny"), tmp_path / "again"))
    assert first == again
    assert json.loads(out)["bytes"] == sum(map(len, again.values()))


def test_broken_export_leaves_no_bundle(
    pair_dirs: Callable[[str], Directories], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A full disk, SIGKILL and SIGTERM while weights are written."""
    command = [sys.executable, "-c", SCRIPT, *map(str, pair_dirs("tiny")), str(tmp_path)]
    command.append(str(request.config.cache.mkdir("traces")))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    codes = dict(line.split() for line in done.stdout.splitlines())
    assert codes == {"full": "2", "kill": str(-signal.SIGKILL), "stop": "143"}
    assert not list(tmp_path.rglob(MANIFEST))
    assert not (tmp_path / "kill" / "bundle").exists()
    for how in ("full", "stop"):
        assert list((tmp_path / how).iterdir()) == []
        assert "Traceback" not in (tmp_path / f"{how}.err").read_text()
    last = (tmp_path / "full.err").read_text().splitlines()[-1]
    assert "writing failed (File too large); free some space" in last


def test_existing_output_is_kept(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exists already; choose another --output, or pass --force"):
        check_output(bundle("dense"), force=False)
    check_output(bundle("dense"), force=True)
    (tmp_path / "notes.txt").write_text("precious")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=r"is not a bundle, so it will not be replaced"):
            check_output(path, force=True)


@pytest.mark.parametrize("manifest", ['{"name": "a web page"}', "[", None])
def test_only_bundles_are_replaced(manifest: str | None, copy: Path) -> None:
    """A directory with another tool's manifest.json, or with a file that the manifest does not list, is kept."""
    if manifest is None:
        (copy / "notes.txt").write_text("precious")
    else:
        (copy / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=r"is not a bundle, so it will not be replaced"):
        check_output(copy, force=True)


def test_a_link_is_followed(copy: Path, pair_dirs: Callable[[str], Directories], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copy)
    export_bundle(open_pair(*pair_dirs("tiny")), link, ExportOptions("onnx", RECIPES["fp32"], force=True))
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"]
    assert read_manifest(copy).max_seq_len == 4096  # the default; the replaced bundle had MAX_SEQ_LEN


def test_default_context_is_at_most_the_positions_of_the_target(
    pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    pair = open_pair(*pair_dirs("tiny"))
    short = replace(pair, target=replace(pair.target, max_position_embeddings=1000))
    export_bundle(short, tmp_path / "b", ExportOptions("onnx", RECIPES["fp32"]))
    assert read_manifest(tmp_path / "b").max_seq_len == 1000


@pytest.mark.parametrize("drafts", [0, 1, 32])
def test_few_and_many_drafts(drafts: int, pair_dirs: Callable[[str], Directories], tmp_path: Path) -> None:
    """With 0, 1 and 32 drafts a round the tokens are those of plain decoding."""
    options = ExportOptions("onnx", RECIPES["fp32"], max_seq_len=MAX_SEQ_LEN, max_draft_tokens=drafts)
    export_bundle(open_pair(*pair_dirs("tiny")), tmp_path / "bundle", options)
    engine = open_engine(tmp_path / "bundle")
    plain, drafted = (list(generate(engine, [5, 6], Options(40, n), Stats())) for n in (0, drafts))
    assert drafted == plain


def test_context_beyond_the_positions_of_the_target_is_refused(
    pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--max-seq-len is 200000, but the target has 131072 positions"):
        export_bundle(
            open_pair(*pair_dirs("dense")), tmp_path / "b", ExportOptions("onnx", RECIPES["fp32"], max_seq_len=200_000)
        )


def test_tampered_bundle_is_refused(copy: Path) -> None:
    content = bytearray((copy / "target.weights").read_bytes())
    content[-5] ^= 1
    (copy / "target.weights").write_bytes(content)
    with pytest.raises(InputError, match=r"target.weights: sha256 differs"):
        open_engine(copy)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda b: (b / "drafter.onnx").unlink(), r"drafter.onnx: named in manifest.json but absent"),
        (lambda b: (b / "drafter.onnx").write_bytes(b"x"), r"drafter.onnx: is 1 bytes, manifest.json says"),
        (lambda b: (b / MANIFEST).unlink(), r"not a bundle, manifest.json is missing"),
        (lambda b: (b / MANIFEST).write_text("{"), r"cannot be read as JSON"),
        (lambda b: edit_manifest(b, format_version=4), r"format_version is 4, this version reads 2 and 3; update it"),
        (lambda b: edit_manifest(b, graphs=None), r"incomplete or malformed"),
        (lambda b: edit_manifest(b, files={"../x": {"size": 1, "sha256": ""}}), r"'../x', outside the bundle"),
        (lambda b: edit_manifest(b, files={}), r"file of graph target is not in files"),
        (lambda b: edit_manifest(b, files=[]), r"incomplete or malformed"),
        (lambda b: edit_manifest(b, max_seq_len=float("inf")), r"incomplete or malformed"),
        (lambda b: edit_manifest(b, num_draft_tokens={"default": 9, "max": 8}), r"default must be between 0 and max"),
        (lambda b: edit_manifest(b, kv={"buffers": []}), r"graph target has other inputs or outputs"),
        (lambda b: edit_manifest(b, limits={"num_tokens": 9}), r"incomplete or malformed"),
        (lambda b: edit_manifest(b, limits=size_limits(400, 8, 16)), r"limits leave no room"),
        (lambda b: edit_manifest(b, limits=size_limits(MAX_SEQ_LEN, 2, 16)), r"limits leave no room"),
        (lambda b: edit_manifest(b, tokens={"bos": "x", "eos": 1}), r"incomplete or malformed"),
        (lambda b: (b / "extra.weights").write_text(""), r"extra.weights: not named in manifest.json"),
        (lambda b: edit_in(b, "kv", "buffers", lambda x: x[1:]), r"graph target has other inputs .*and kv.buffers"),
        (
            lambda b: edit_in(b, "kv", "buffers", lambda x: [*x, x[0]]),
            r"kv.buffers are not inputs .*or one is there twice",
        ),
        (
            lambda b: edit_in(b, "graphs", "drafter", lambda x: {**x, "outputs": x["outputs"][:1]}),
            r"graph drafter has other",
        ),
        (
            lambda b: edit_in(b, "graphs", "target", lambda x: {**x, "inputs": x["inputs"][::-1]}),
            r"graph target has other",
        ),
        (
            lambda b: edit_in(b, "tables", "embed_tokens", lambda x: {**x, "rows": 2.0}),
            r"tables.embed_tokens.rows is 2.0",
        ),
        (
            lambda b: edit_in(b, "tokens", "eos", lambda _: [1, None]),
            r"tokens.eos\[1\] is None, expected a whole number",
        ),
        (
            lambda b: edit_in(b, "tokens", "channels", lambda _: {"thought": [1]}),
            r"tokens.channels.thought is \[1\], expected two token ids",
        ),
        (lambda b: edit_in(b, "num_draft_tokens", "max", lambda _: 2**30), r"limits leave no room"),
        (
            lambda b: edit_in(b, "kv", "buffers", lambda x: [{**x[0], "head_dim": 2**30}, *x[1:]]),
            r"that fit into memory",
        ),
        (
            lambda b: edit_in(b, "kv", "buffers", lambda x: [{**x[0], "head_dim": 2**61}, *x[1:]]),
            r"\[0\].head_dim is 23",
        ),
        (lambda b: edit_manifest(b, two_stage=3), r"two_stage is 3, expected an object"),
        (
            lambda b: edit_manifest(b, source={"target": None, "drafter": {}}),
            r"source.target is None, expected an object",
        ),
        (lambda b: edit_in(b, "target", "layer_types", lambda _: 3), r"target.layer_types is 3, expected a list"),
    ],
    ids=[
        *("missing file", "short file", "no manifest", "bad JSON", "newer format", "malformed", "path outside"),
        *("no files", "files is a list", "endless", "more drafts than allowed", "no cache"),
        *("half the limits", "few cache rows", "few outputs", "odd tokens", "extra file"),
        *("missing buffer", "buffer twice", "missing output", "other order", "fraction of a row", "no end token"),
        *(
            "half a thought",
            "huge rounds",
            "huge buffer",
            "endless buffer",
            "odd two stages",
            "no source",
            "odd layer types",
        ),
    ],
)
def test_incomplete_bundle_is_refused(break_it: Callable[[Path], object], message: str, copy: Path) -> None:
    read_manifest(copy)  # valid before the change
    break_it(copy)
    with pytest.raises(InputError, match=message):
        read_manifest(copy)


def test_unknown_manifest_keys_are_ignored(copy: Path) -> None:
    kv = read_manifest(copy).raw["kv"]
    kv["buffers"][0]["unknown"] = 1
    edit_manifest(copy, unknown=1, kv=kv)
    assert [buffer.name for buffer in read_manifest(copy).kv] == [buffer["name"] for buffer in kv["buffers"]]


def edit_in(bundle: Path, section: str, key: str, change: Callable[[Any], Any]) -> None:
    """Change one key of a section of a bundle's manifest."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest[section][key] = change(manifest[section].get(key))
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def edit_manifest(bundle: Path, **changes: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parity_passes_and_lists_its_checks(
    backend: str, bundle: Callable[..., Path], pair_dirs: Callable[[str], Directories]
) -> None:
    """The last prompt is longer than a prefill chunk."""
    prompts = [[5], list(range(3, 40)), list(range(3, 250))]
    checks = run_parity(bundle("odd", backend), open_pair(*pair_dirs("odd")), prompts, 12)
    assert [check for check in checks if not check.passed] == []
    assert {"files", "source", "weights", "graphs", "plain", "speculative"} == {check.stage for check in checks}
    assert all(0 < c.error <= c.tolerance for c in checks if c.error is not None and c.tolerance is not None)


@pytest.mark.parametrize("weights", ["target.weights", "drafter.weights"])
@pytest.mark.parametrize("update_digest", [False, True], ids=["plain", "with a new digest"])
def test_parity_sees_one_changed_weight(
    weights: str, update_digest: bool, copy: Path, pair_dirs: Callable[[str], Directories]
) -> None:
    """Parity fails when the lowest bit of one weight differs, also if the manifest has the new digest."""
    content = bytearray((copy / weights).read_bytes())
    content[-4] ^= 1
    (copy / weights).write_bytes(content)
    if update_digest:
        files = read_manifest(copy).raw["files"]
        files[weights]["sha256"] = hashlib.sha256(content).hexdigest()
        edit_manifest(copy, files=files)
    failed = {check.stage for check in run_parity(copy, open_pair(*pair_dirs("dense")), [[5]], 2) if not check.passed}
    assert "weights" in failed
    assert ("files" in failed) != update_digest


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": {"bos": 2, "eos": [7], "pad": 0}},
        {"max_seq_len": 10**7, "limits": size_limits(10**7, 8, 16)},
        {"limits": size_limits(MAX_SEQ_LEN, 8, 16) | {"num_outputs": 64}},
        {"two_stage": {"origin": "checkpoint", "num_clusters": 1, "cluster_size": 256, "top_k_clusters": 1}},
    ],
)
def test_parity_sees_a_changed_manifest(
    changes: dict[str, object], copy: Path, pair_dirs: Callable[[str], Directories]
) -> None:
    """A runtime relies on these entries, and no digest covers them."""
    edit_manifest(copy, **changes)
    checks = run_parity(copy, open_pair(*pair_dirs("dense")), [[5]], 2)
    failed = [check for check in checks if not check.passed]
    assert [(check.stage, check.output) for check in failed] == [("source", "manifest")]
    assert next(iter(changes)) in failed[0].detail


def test_parity_reports_a_bundle_that_cannot_run(
    bundle: Callable[[str], Path], pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    """Token ids beyond the vocabulary make the drafter fail while it runs: that is a failed check, not a crash."""
    broken = Path(shutil.copytree(bundle("e2b"), tmp_path / "broken"))
    entry = stored_weights(broken / "drafter.onnx")["head.token_ids"]
    content = bytearray((broken / "drafter.weights").read_bytes())
    content[entry.offset : entry.offset + entry.length] = np.float32(256).tobytes() * (entry.length // 4)
    (broken / "drafter.weights").write_bytes(content)
    failed = {check.stage for check in run_parity(broken, open_pair(*pair_dirs("e2b")), [[5]], 4) if not check.passed}
    assert {"files", "weights", "bundle"} <= failed


def test_parity_sees_what_is_not_finite(copy: Path, pair_dirs: Callable[[str], Directories]) -> None:
    """NaN in the embedding of a token that only the second prompt has."""
    row = 77 * read_manifest(copy).tables["embed_tokens_per_layer"]["row_bytes"]
    content = bytearray((copy / "per_layer.table").read_bytes())
    content[row : row + 4] = b"\x00\x00\xc0\x7f"
    (copy / "per_layer.table").write_bytes(content)
    checks = run_parity(copy, open_pair(*pair_dirs("dense")), [[5], [5, 77]], 2)
    assert "not finite" in {check.detail for check in checks if check.stage == "graphs" and not check.passed}


def test_parity_sees_another_checkpoint(
    bundle: Callable[[str], Path], pair_dirs: Callable[[str], Directories], tmp_path: Path
) -> None:
    target = Path(shutil.copytree(pair_dirs("dense")[0], tmp_path / "target"))
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (target / "model.safetensors").write_bytes(content)
    checks = run_parity(bundle("dense"), open_pair(target, pair_dirs("dense")[1]), [[5]], 2)
    assert {"source", "weights"} <= {check.stage for check in checks if not check.passed}
