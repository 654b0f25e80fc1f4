"""The worked example of FORMAT.md, recomputed from bundles of the built-in pair."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporter.bundle.export import ExportOptions, resolve_max_seq_len
from exporter.checkpoint.pair import open_pair
from exporter.demo import PAIR
from exporter.graphs.spec import size_limits
from exporter.quantization.recipes import RECIPES
from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling, choose, uniform
from runtime_ref.tables import Table
from runtime_ref.tokenizer import TextTokenizer

PAGE = (Path(__file__).parents[2] / "FORMAT.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.partition("## Worked example")[2]
MANIFEST, PER_LAYER = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", EXAMPLE, re.S))
VERSIONED = ("tool_version", "backend", "files")  # these change with the packages that export
CONTEXT = ("max_seq_len", "limits")  # the page's bundle has the target's whole context, that of the tests a shorter one


def cells(pattern: str) -> list[tuple[str, ...]]:
    """Cells of the matching lines of the example's tables; `INTS` matches integers, `LOGITS` ids with their logits."""
    pattern = pattern.replace("INTS", r"(\d+(?:, \d+)*)").replace("LOGITS", r"(\d+: [\d.]+(?:, \d+: [\d.]+)+)")
    return re.findall(rf"^\| {pattern} \|", EXAMPLE, re.M)


def integers(cell: str) -> list[int]:
    return [int(number) for number in cell.split(", ")]


def assert_part_of(part: Any, whole: Any) -> None:
    """Objects on the page have some of the keys of the whole ones, lists have the first entries."""
    if isinstance(part, dict):
        for key in part:
            assert_part_of(part[key], whole[key])
    elif isinstance(part, list):
        assert len(part) <= len(whole)
        for one, other in zip(part, whole, strict=False):
            assert_part_of(one, other)
    else:
        assert part == whole


def test_manifest_of_the_page_is_part_of_the_exported_one(bundle: Callable[..., Path]) -> None:
    raw = json.loads((bundle("demo") / "manifest.json").read_text(encoding="utf-8"))
    assert_part_of({key: value for key, value in MANIFEST.items() if key not in VERSIONED + CONTEXT}, raw)


def test_limits_of_the_page_are_those_of_the_default_export() -> None:
    pair = open_pair(PAIR / "target", PAIR / "drafter")
    max_drafts = ExportOptions.max_draft_tokens
    max_seq_len = resolve_max_seq_len(pair, ExportOptions("onnx", RECIPES["fp32"]))
    assert MANIFEST["max_seq_len"] == max_seq_len
    assert MANIFEST["limits"] == size_limits(max_seq_len, max_drafts, pair.target.sliding_window)


def test_rounds_of_the_page_are_the_runtimes(bundle: Callable[..., Path]) -> None:
    directory = bundle("demo")
    engine = load_engine(directory, read_manifest(directory), threads=1)
    prompt = TextTokenizer(directory, engine.manifest).encode("Return the exception instance,")
    assert cells("id" + r" \| (\d+)" * len(prompt)) == [tuple(map(str, prompt))]
    last = engine.prefill(prompt, Sampling()).tokens[-1]
    rounds = cells(r"INTS \| INTS \| INTS \| INTS \| INTS \| INTS \| INTS")
    assert len(rounds) == 4
    for line in rounds:
        position, newest, drafts, choices, accepted, added, new_position = map(integers, line)
        assert ([engine.position], [last], engine.draft(last, 4)) == (position, newest, drafts)
        logits, ids, _ = engine.run_target([last, *drafts], range(5))
        assert ids[:, 0].tolist() == choices
        if line is rounds[0]:
            for row, shown in enumerate(cells(r"\d \| \d+ \| LOGITS")):
                pairs = [pair.split(": ") for pair in shown.split(", ")]
                assert [int(token) for token, _ in pairs] == ids[row, :3].tolist()
                np.testing.assert_allclose([float(logit) for _, logit in pairs], logits[row, :3], atol=2e-4)
            assert [ids[0, choose(logits[0], 7, Sampling(2.0, 0.9, seed, 5))] for seed in (1, 0)] == [803, 1051]
        done = engine.verify(last, drafts, Sampling())
        assert ([done.accepted], [engine.position]) == (accepted, new_position)
        assert done.tokens[: len(added)] == added
        last = done.tokens[-1]
    assert added[-1] in engine.manifest.eos


def test_noise_of_the_page_is_the_runtimes() -> None:
    (found,) = re.findall(r"z >> 40 += 0x([0-9A-F]+) = (\d+)\n", EXAMPLE)
    assert int(found[0], 16) == int(found[1]) == uniform(1, 7) * 2**24


def test_embedding_rows_of_the_page_are_the_tables(bundle: Callable[..., Path]) -> None:
    directory = bundle("demo", recipe="int4")
    facts = read_manifest(directory).tables
    assert facts["embed_tokens_per_layer"] == PER_LAYER
    (scaled,) = re.findall(r"^\| times scale 0 \| (.*) \|$", EXAMPLE, re.M)
    (start,) = re.findall(r"The row begins (-[-\d., ]+)\.\n", EXAMPLE)
    for name, shown in (("embed_tokens_per_layer", scaled.split(" | ")), ("embed_tokens", start.split(", "))):
        expected = Table(directory, facts[name])[[470]][0][: len(shown)]
        assert [float(number) for number in shown] == expected.tolist()
