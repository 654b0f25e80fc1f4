"""Open the checkpoints that a bundle was made from, with what the bundle alone determines: clusters and calibration."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from clustering.cluster_table import load_table
from exporter.bundle.export import CHECKPOINT, CLUSTERS
from exporter.checkpoint.adapters import MergedReader
from exporter.checkpoint.folding import FOLDING, folded_weights, read_folding
from exporter.checkpoint.pair import Calibrated, Pair, open_pair
from exporter.checkpoint.tensors import IntegerReader
from exporter.graphs.backend import load_backend
from exporter.graphs.parts import graph_parts
from exporter.parity.checks import Check
from exporter.quantization.recipes import recipe_of
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, Manifest, changed_files, read_manifest

# Of the norm of a matrix. Rounding to the nearest 4 bits makes an error of 0.1 to 0.2, and calibration one of up to 0.6
# where inputs or weights have outliers; another matrix makes one of about 1.4.
MAX_CALIBRATED_ERROR = 1.0


def open_source(bundle: Path, target_dir: Path, drafter_dir: Path, adapter_dirs: Sequence[Path] = ()) -> Pair:
    """Open the checkpoints that a bundle was made from, with the bundle's head.

    Args:
        bundle: a directory that `export` wrote.
        target_dir: the target's checkpoint.
        drafter_dir: the drafter's checkpoint.
        adapter_dirs: the adapters that were merged into the target.

    Raises:
        InputError: the bundle or a checkpoint cannot be read, or they do not fit each other.
    """
    manifest = read_manifest(bundle)
    pair = _with_head(bundle, manifest, partial(open_pair, target_dir, drafter_dir, adapter_dirs=adapter_dirs))
    if manifest.raw.get("activations") == CHECKPOINT:
        pair = pair.with_activations()
    return pair if "calibration" not in manifest.raw else with_stored_integers(bundle, manifest, pair)


def _with_head(bundle: Path, manifest: Manifest, opened: Callable[..., Pair]) -> Pair:
    two_stage = manifest.raw["two_stage"]
    if two_stage is None:
        return opened("dense")
    try:
        origin, top_k = two_stage["origin"], int(two_stage["top_k_clusters"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{bundle / MANIFEST}: two_stage is malformed ({reason}); export the bundle again") from error
    if origin == "checkpoint":
        return opened("checkpoint", top_k)
    pair = opened("dense")
    text = pair.drafter.text
    table, _ = load_table(bundle / CLUSTERS, text.vocab_size, text.hidden_size)
    return pair.with_clusters(table, top_k, origin)


def refuse_other_sizes(bundle: Path, manifest: Manifest, pair: Pair) -> None:
    """Check that a pair has the sizes of a bundle.

    Args:
        bundle: the bundle, for the message.
        manifest: its manifest.
        pair: the checkpoints that it is to be compared with.

    Raises:
        InputError: it has not, so it is another pair.
    """
    for model, config in (("target", pair.target), ("drafter", pair.drafter)):
        in_checkpoint = json.loads(json.dumps(asdict(config)))
        in_bundle = manifest.raw[model]
        for key in sorted(in_checkpoint.keys() | in_bundle.keys()):
            if in_checkpoint.get(key) != in_bundle.get(key):
                raise InputError(
                    f"{bundle}: was exported from another {model}: {key} is {in_bundle.get(key)}, the checkpoint has"
                    f" {in_checkpoint.get(key)}; pass the checkpoints it was made from"
                )


def with_stored_integers(bundle: Path, manifest: Manifest, pair: Pair) -> Pair:
    """Return a pair with the integers of a calibrated bundle, which its checkpoints alone do not determine.

    Args:
        bundle: the bundle.
        manifest: its manifest, which has `calibration`.
        pair: the checkpoints it was made from.

    Raises:
        InputError: the bundle does not hold what its manifest lists, or was made from another pair.
    """
    refuse_other_sizes(bundle, manifest, pair)
    recipe = recipe_of(manifest)
    shapes = graph_parts(pair, recipe)["target"].shapes
    try:
        if FOLDING in manifest.files:
            pair = pair.with_folding(read_folding((bundle / FOLDING).read_bytes(), shapes))
        part = graph_parts(pair, recipe)["target"]
        entry = manifest.raw["calibration"]
        names = [str(name) for name in entry["matrices"]]
        file = bundle / manifest.graphs["target"].file
        read = load_backend(manifest.backend).stored_integers(part, file, names, manifest.raw["backend"])
        calibrated = Calibrated(entry["texts"], entry["sha256"], entry["tokens"], entry["threads"], tuple(names))
    except Exception as error:  # a damaged graph raises whatever its library does
        if changed_files(bundle, manifest):
            return pair  # parity shows that first
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{bundle / MANIFEST}: calibration does not fit the files ({reason}); export the bundle again"
        ) from error
    return replace(pair, target_weights={**pair.target_weights, **read}, calibrated=calibrated)


def calibration_check(pair: Pair) -> Check:
    """Check that calibrated matrices are near those of the checkpoint: none is another, or of another model.

    Args:
        pair: what `with_stored_integers` returned.
    """
    assert pair.calibrated is not None
    floats, worst, error = folded_weights(pair.mapped_target_weights, pair.folding), "", 0.0
    for name in pair.calibrated.matrices:
        read, matrix = pair.target_weights[name], floats[name]
        assert isinstance(read, IntegerReader)
        # What an adapter changes is merged block by block, all else is mapped.
        rows = matrix.rows if isinstance(matrix, MergedReader) else matrix().__getitem__
        start, squared, total = 0, 0.0, 0.0
        for block in read.blocks():
            expected = rows(slice(start, start + len(block))).float()
            squared, total = squared + float((block - expected).square().sum()), total + float(expected.square().sum())
            start += len(block)
        if (relative := (squared / total) ** 0.5 if total else squared) >= error or relative != relative:
            worst, error = name, relative
    detail = f"largest {worst}, of {len(pair.calibrated.matrices)} matrices" if worst else ""
    passed = error <= MAX_CALIBRATED_ERROR
    return Check("weights", "calibrated error", passed, error=error, tolerance=MAX_CALIBRATED_ERROR, detail=detail)
