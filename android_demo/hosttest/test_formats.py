"""Kotlin runs bundles of every released format, and bundles with features that no export writes yet.

Run by `make android-test`, which builds the app's core and a bundle.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import BUILD, DEFAULTS, compare, in_kotlin, in_python

from runtime_ref.manifest import read_manifest
from runtime_ref.requirements import FEATURES
from tests import handmade
from tests.golden.make_golden import GOLDEN, TEXTS


@pytest.mark.parametrize("bundle", sorted(GOLDEN.glob("format*/*/")), ids=lambda path: "-".join(path.parts[-2:]))
def test_golden_bundle_gives_its_tokens(bundle: Path, tmp_path: Path) -> None:
    """The tokens that Python gave when the bundle was made."""
    expected = json.loads((bundle.parent / TEXTS).read_text(encoding="utf-8"))
    requests = []
    for text in expected:
        request = {key: value for key, value in text.items() if key in DEFAULTS}
        request |= {"prompt": text.get("prompt") or text["messages"], "seed": str(text.get("seed", 0))}
        requests += [DEFAULTS | request | {"num_draft_tokens": drafts} for drafts in (0, 4, None)]
    results = in_kotlin(bundle, requests, tmp_path)
    for i, result in enumerate(results):
        text = expected[i // 3]
        assert {key: result[key] for key in ("tokens", "text", "finish_reason")} == {
            key: text[key] for key in ("tokens", "text", "finish_reason")
        }, requests[i]


@pytest.mark.parametrize("feature", FEATURES)
def test_bundle_with_a_feature(feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, _ = handmade.FEATURES[feature]
    bundle = handmade.handmade(BUILD / "bundle-onnx-fp32", tmp_path / "bundle", change)
    prompts: list[list[int]] = [[2, 5, 9], list(range(3, 1100, 7))]
    requests: list[dict[str, Any]] = [
        DEFAULTS | {"prompt": prompt, "num_draft_tokens": drafts} for prompt in prompts for drafts in (0, 4, None)
    ]
    assert [entry["name"] for entry in read_manifest(bundle).raw["requires"]] == [feature]
    python = in_python(bundle, requests, monkeypatch)
    assert compare(requests, in_kotlin(bundle, requests, tmp_path), python) == []
    by_prompt = [{tuple(result["tokens"]) for result in python[i : i + 3]} for i in (0, 3)]
    assert [len(different) for different in by_prompt] == [1, 1]
