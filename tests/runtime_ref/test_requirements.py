"""What a bundle requires of its reader: features known and unknown, and the version of the runtime library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from runtime_ref import requirements
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine, open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import MANIFEST, read_manifest
from runtime_ref.requirements import require_runtime, version_numbers
from runtime_ref.stats import Stats
from runtime_ref.tables import Table
from tests.handmade import FEATURES, handmade

PROMPT = [3, 200, 17, 45, 45, 9] * 50  # past the sliding window; the answer moves its buffers once more


def answers(bundle: Path) -> tuple[list[list[int]], Mapping[str, np.ndarray]]:
    """Return plain and speculative tokens, and the cache after them."""
    engine = load_engine(bundle, read_manifest(bundle), threads=1)
    return [list(generate(engine, PROMPT, Options(140, drafts), Stats())) for drafts in (0, 4)], engine.cache.buffers


def test_each_feature_has_a_hand_made_bundle() -> None:
    assert FEATURES.keys() == requirements.FEATURES.keys()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_known_feature_runs(feature: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    change, same = FEATURES[feature]
    source = bundle("e2b") if same is None else handmade(bundle("e2b"), tmp_path / "same", same)
    made = handmade(bundle("e2b"), tmp_path / "made", change)
    assert [entry["name"] for entry in read_manifest(made).raw["requires"]] == [feature]
    (plain, speculative), cache = answers(made)
    assert plain == speculative
    if feature == "kv-float16":  # rounded, so tokens may differ
        assert {array.dtype for array in cache.values()} == {np.dtype(np.float16)}
        assert all(array.any() for array in cache.values())
    else:
        assert plain == answers(source)[0][0]


def test_a_cache_in_float16_is_near_one_in_float32(bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(bundle("e2b"), tmp_path / "made", FEATURES["kv-float16"][0])
    engines = [load_engine(b, read_manifest(b), 1) for b in (bundle("e2b"), made)]
    for engine in engines:
        engine.extend(PROMPT[:18], [17])
    logits = [engine.run_target(PROMPT[18:20], [1])[0] for engine in engines]
    np.testing.assert_allclose(logits[1], logits[0], atol=0.02)
    assert (logits[1] != logits[0]).any()


def test_the_head_of_its_own_is_read(bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(bundle("e2b"), tmp_path / "made", FEATURES["untied-head"][0])
    tables = load_engine(made, read_manifest(made), 1).tables
    np.testing.assert_array_equal(tables["head"][[7, 0]], -2 * tables["embed_tokens"][[7, 0]])


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_rows_of_a_split_table(recipe: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(bundle("e2b", recipe=recipe), tmp_path / "made", FEATURES["split-tables"][0])
    whole, split = (
        Table(b, read_manifest(b).tables["embed_tokens_per_layer"]) for b in (bundle("e2b", recipe=recipe), made)
    )
    for ids in ([0, 1, 4, 5, 6, 255], [127], [128, 127, 5, 4, 0], list(range(256))):
        np.testing.assert_array_equal(split[ids], whole[ids])
    with pytest.raises(InputError, match="has 256 rows, token 256"):
        split[[256]]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_requires_does_not_name_is_refused(
    feature: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    made = handmade(bundle("e2b"), tmp_path / "made", FEATURES[feature][0])
    edit(made, requires=[])
    with pytest.raises(InputError, match=f"requires does not name {feature}, which the manifest uses"):
        read_manifest(made)


@pytest.mark.parametrize("feature", FEATURES)
def test_an_unknown_feature_is_refused(
    feature: str, bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a reader of the time before the feature."""
    made = handmade(bundle("e2b"), tmp_path / "made", FEATURES[feature][0])
    monkeypatch.delitem(requirements.FEATURES, feature)
    with pytest.raises(InputError, match=f"needs the feature '{feature}', which gemma-mtp-export 0.2.0 brought"):
        read_manifest(made)


def test_an_unknown_feature_is_told_whatever_else_is_new(bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(bundle("tiny"), tmp_path / "made")
    edit(made, requires=[{"name": "tensors", "since": "9.1.0", "more": 1}], kv={"tensors": []}, tables=None)
    with pytest.raises(InputError) as caught:
        open_engine(made)
    assert str(caught.value) == (
        f"{made / MANIFEST}: needs the feature 'tensors', which gemma-mtp-export 9.1.0 brought and this version does"
        " not have; update it, or export the bundle without that feature"
    )


@pytest.mark.parametrize("requires", [None, {}, "x", [1], [{"name": "channels"}], [{"name": 1, "since": "1"}]])
def test_requires_of_another_form_is_refused(requires: object, bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(bundle("tiny"), tmp_path / "made")
    edit(made, requires=requires)
    with pytest.raises(InputError, match=r"requires is .*expected a list of objects with name and since"):
        read_manifest(made)


@pytest.mark.parametrize(
    ("oldest", "accepted"), [("1.0", True), ("1.32.0.0", True), (None, True), ("1.99", False), ("9.0.1", False)]
)
def test_an_older_runtime_library_is_refused(
    oldest: str | None, accepted: bool, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    made = handmade(bundle("tiny"), tmp_path / "made", lambda _, manifest: set_oldest(manifest, oldest))
    if accepted:
        open_engine(made, 1)
        return
    with pytest.raises(InputError, match=f"needs onnxruntime {oldest} or later, [0-9.]+ is installed; update it"):
        open_engine(made, 1)


def test_versions_are_compared_by_their_numbers(tmp_path: Path) -> None:
    assert version_numbers("1.31.1rc2") == [1, 31, 1]
    assert version_numbers("1.5.0a0+cpu") == [1, 5]
    assert version_numbers("1.32.0") == version_numbers("1.32")
    require_runtime(tmp_path, "library", "1.10", "1.9")
    require_runtime(tmp_path, "library", "1.32", "1.32.0")
    with pytest.raises(InputError, match=r"needs library 1.10 or later, 1.9.2 is installed"):
        require_runtime(tmp_path, "library", "1.9.2", "1.10")


@pytest.mark.parametrize("oldest", ["next", "v1.3", "", "1" * 5000, 1.25])
def test_what_is_no_version_is_refused(oldest: object, bundle: Callable[..., Path], tmp_path: Path) -> None:
    made = handmade(
        bundle("tiny"), tmp_path / "made", lambda _, manifest: manifest["backend"].update(min_runtime=oldest)
    )
    with pytest.raises(InputError, match=r"backend.min_runtime is .*, expected a version such as 1.32.0"):
        read_manifest(made)


def test_another_digest_is_refused(bundle: Callable[..., Path]) -> None:
    manifest = read_manifest(bundle("tiny"))
    assert open_engine(bundle("tiny"), 1, digest=manifest.digest.upper()).manifest.digest == manifest.digest
    with pytest.raises(InputError, match=f"has the sha256 {manifest.digest}, expected 00; this is not the bundle"):
        open_engine(bundle("tiny"), 1, digest="00")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "target.1.weights"])
def test_a_file_that_no_digest_covers_is_refused(name: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Else the digest of the manifest would not stand for all that is read."""
    made = handmade(bundle("tiny"), tmp_path / "made")
    (made / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name}: not named in manifest.json, so it cannot be checked"):
        read_manifest(made)


@pytest.mark.parametrize("marks", [None, [5, 6]])
def test_format_2_reads_as_format_3(marks: list[int] | None, bundle: Callable[..., Path], tmp_path: Path) -> None:
    """On a bundle with scales and marks of thoughts, which the golden bundles of format 2 lack."""
    source = bundle("e2b", recipe="int4")
    made = handmade(source, tmp_path / "made", lambda _, manifest: to_format_2(manifest, marks))
    expected, actual = read_manifest(source), read_manifest(made)
    assert actual.format_version == 2
    assert actual.channels == ({} if marks is None else {"thought": (5, 6)})
    for name in ("tables", "kv", "graphs", "limits", "files", "sampling", "eos"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert (actual.raw["source"], actual.raw["requires"]) == (expected.raw["source"], [])
    assert actual.min_runtime == expected.min_runtime
    assert answers(made)[0] == answers(source)[0]


@pytest.mark.parametrize(
    ("section", "value"),
    [("tokens", {"channels": []}), ("tokens", {"channels": {"x": 5}}), ("backend", {"min_runtime": 5})],
)
def test_keys_that_format_2_does_not_know_are_ignored(
    section: str, value: dict, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    made = handmade(bundle("e2b", recipe="int4"), tmp_path / "made", lambda _, manifest: to_format_2(manifest, None))
    edit(made, **{section: json.loads((made / MANIFEST).read_text())[section] | value})
    assert (read_manifest(made).channels, read_manifest(made).min_runtime) == ({}, "1.25")


def to_format_2(manifest: dict, marks: list[int] | None) -> None:
    """Write a manifest as gemma-mtp-export 0.1.0 did."""
    manifest["format_version"] = 2
    del manifest["requires"], manifest["backend"]["min_runtime"]
    for table in manifest["tables"].values():
        for name in ("data", "scales"):
            (part,) = table[name].pop("parts")
            table[name] |= {"file": part["file"], "offset": part["offset"]}
    for buffer in manifest["kv"]["buffers"]:
        del buffer["dtype"], buffer["layout"]
    manifest["kv"] |= {"dtype": "float32", "layout": ["num_key_value_heads", "rows", "head_dim"]}
    manifest["tokens"]["thoughts"] = marks
    manifest["source"] = {model: entry["files"] for model, entry in manifest["source"].items()}


def set_oldest(manifest: dict, oldest: str | None) -> None:
    del manifest["backend"]["min_runtime"]
    if oldest is not None:
        manifest["backend"]["min_runtime"] = oldest


def edit(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text()) | changes
    (bundle / MANIFEST).write_text(json.dumps(manifest))
