"""The report page: well-formed, self-contained, with the numbers of its document, and clear about failures."""

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from exporter.bench.speculation import ForcedEngine, speedups_from_tokens
from exporter.cli.schemas import document_schema
from exporter.parity.source import open_source
from exporter.report.content import ReportOptions, measure_report
from exporter.report.page import render
from exporter.report.texts import (
    Text,
    acceptance,
    draft_lengths,
    generate_text,
    openings,
    speed,
    tokens_per_round,
)
from runtime_ref.acceptance import Round
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.manifest import read_manifest
from runtime_ref.stats import Stats
from tests.conftest import Directories, Run

Bundle = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("report")  # in one process, which measures the document once

SECTIONS = ["acceptance", "rounds", "speed", "costs", "sample", "recall", "memory", "parity"]
VOID = {"meta", "br", "hr", "img", "input", "link"}
PROMPTS = [[2, 5, 7], [2, 9, 11, 13]]


class Page(HTMLParser):
    """The tags, attributes and text of a page; fails if tags do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def document(bundle: Bundle, pair_dirs: Callable[[str], Directories]) -> dict[str, Any]:
    path = bundle("e2b")
    notes: list[str] = []
    measured = measure_report(
        path, open_source(path, *pair_dirs("e2b")), PROMPTS, ReportOptions(1, 12, seconds=0.02), notes.append
    )
    assert "recall: drafting" in notes
    return measured


@pytest.fixture(scope="module")
def page(document: dict[str, Any]) -> str:
    return render(document)


def round_of(num_drafts: int, accepted: int, num_tokens: int) -> Round:
    """A round of so many drafts and tokens; what they are does not matter to counts."""
    return Round([0] * num_drafts, accepted, [0] * num_tokens, [0.0] * num_tokens)


def with_drafting(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    measured = document["measured"]
    return {**document, "measured": {**measured, "drafting": {**measured["drafting"], **changes}}}


def test_document(document: dict[str, Any], bundle: Bundle) -> None:
    manifest = read_manifest(bundle("e2b"))
    assert json.loads(json.dumps(document)) == document
    assert document["parity"]["passed"]
    assert {"files", "weights", "graphs", "speculative"} <= {check["rung"] for check in document["parity"]["checks"]}
    measured = document["measured"]
    rates, drafting = measured["speed"], measured["drafting"]
    assert [row["num_draft_tokens"] for row in rates["measured"]] == [0, 1, 2, 4, 8]
    assert [row["num_draft_tokens"] for row in rates["computed"]] == list(range(1, manifest.max_draft_tokens + 1))
    assert rates["same_tokens"]
    auto = rates["auto"]
    assert sum(row["rounds"] for row in auto["chosen"]) == auto["rounds"] > 0
    assert all(0 <= row["num_draft_tokens"] <= manifest.max_draft_tokens for row in auto["chosen"])
    assert rates["measured"][0]["times_faster"] == 1
    assert drafting["num_draft_tokens"] == manifest.default_draft_tokens
    assert len(drafting["longest"]["by_position"]) == manifest.max_draft_tokens
    assert measured["texts"]["count"] == len(PROMPTS)
    rounds = drafting["rounds"]
    assert sum(row["rounds"] for row in rounds["distribution"]) == rounds["rounds"]
    added = sum(row["rounds"] * row["tokens"] for row in rounds["distribution"])
    assert added == measured["texts"]["new_tokens"] - len(PROMPTS)  # the first token of each is the prefill's
    recall = document["recall"]
    assert recall["num_states"] == 4 * (measured["texts"]["new_tokens"] + measured["texts"]["prompt_tokens"])
    assert recall["curve"][-1]["recall"] == 1
    assert document["total_bytes"] == sum(document["files"].values())


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "object", "metadata"} & set(parsed.tags)
    assert parsed.values("src") == []
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    references = set(parsed.values("href")) | {f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", page)}
    assert len(references) > 3
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert all(reference.startswith("#") for reference in references)


def test_every_section_is_there(page: str) -> None:
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    parsed = Page(page)
    assert parsed.tags.count("svg") == 6
    assert 'class="absent"' not in page
    for words in ("PASS", "Machine", "onnx, recipe fp32", "exported by", "K, drafts per round", "a draft step"):
        assert words in parsed.text


def test_numbers_are_those_of_the_document(document: dict[str, Any], page: str) -> None:
    text, measured = Page(page).text, document["measured"]
    drafting = measured["drafting"]
    numbers = re.findall(r'<div class="number"><b>([^<]+)</b>', page)
    headline = next(row for row in measured["speed"]["measured"] if row["num_draft_tokens"] == 4)
    assert numbers == [
        f"{100 * drafting['acceptance']['rate']:.1f}",
        f"{drafting['rounds']['mean']:.2f}",
        f"{measured['speed']['auto']['times_faster']:.2f}",
        "PASS",
    ]
    for row in (*measured["speed"]["measured"], measured["speed"]["auto"]):
        rate = row["tokens_per_second"]
        assert f"{rate['median']:.1f} ({rate['min']:.1f}, {rate['max']:.1f})" in text
    assert f"K auto (K = 4: {headline['times_faster']:.2f})" in text
    for row in measured["speed"]["auto"]["chosen"]:
        percentage = 100 * row["rounds"] / measured["speed"]["auto"]["rounds"]
        assert f"{row['num_draft_tokens']} {percentage:.0f} " in text
    for row in measured["costs"]["passes"]:
        assert f"{row['ms']['median']:.2f} ({row['ms']['min']:.2f}) {row['cost']:.2f}" in text
    for row in document["recall"]["curve"]:
        assert f"{100 * row['recall']:.1f} %" in text
    for name in document["files"]:
        assert name in text
    for check in document["parity"]["checks"]:
        assert f"{check['rung']}: {check['output']} PASS" in text
    assert render(document) == page


def test_names_and_texts_are_escaped(document: dict[str, Any]) -> None:
    nasty = "<b onclick='x'>&\"$x$\u2028"
    pieces = [{"text": nasty, "drafted": True}, {"text": "\n</div>", "drafted": False}]
    sample = {**document["measured"]["drafting"]["sample"], "prompt": nasty, "pieces": pieces}
    changed = with_drafting({**document, "name": nasty, "bundle": nasty, "files": {nasty: 5}}, sample=sample)
    parsed = Page(render(changed))
    assert parsed.open == []
    assert "b" not in parsed.tags[parsed.tags.index("main") :]
    assert parsed.values("onclick") == []
    assert parsed.words.count(nasty) >= 3
    assert any(nasty in words and "5 B" in words for words in parsed.words)
    assert any(nasty in label for label in parsed.values("aria-label"))
    assert "\u21b5\n</div>" in parsed.words


def test_drafts_are_underlined(document: dict[str, Any]) -> None:
    pieces = [{"text": text, "drafted": drafted} for text, drafted in (("one", False), ("two", True), ("", True))]
    sample = {**document["measured"]["drafting"]["sample"], "pieces": pieces}
    page = render(with_drafting(document, sample=sample))
    assert '<span>one</span><span class="drafted">two</span></div>' in page


def test_failures_come_first(document: dict[str, Any]) -> None:
    checks = [
        *document["parity"]["checks"],
        {**document["parity"]["checks"][0], "passed": False, "detail": "changed: x"},
    ]
    page = render({**document, "parity": {**document["parity"], "passed": False, "checks": checks}})
    head, _, rest = page.partition("<main>")
    assert "changed: x" in Page(head).text
    assert "did not pass parity" in head
    assert "<b>FAIL</b>" in head
    verdicts = re.findall(r"PASS|FAIL", rest.partition('<section id="parity"')[2])
    assert verdicts == ["FAIL", "FAIL", *["PASS"] * (len(checks) - 1)]


def test_the_schema_holds_without_drafts_and_memory(document: dict[str, Any]) -> None:
    """As of a bundle with at most 0 draft tokens, on a system without /proc."""
    schema = document_schema("report", strict=True)
    validate({"schema_version": 1, **document}, schema)
    measured = deepcopy(document["measured"])
    measured["drafting"] = measured["speed"]["auto"] = None
    del measured["speed"]["computed"]
    measured["load"]["resident"] |= {"before": None, "loaded": None, "generated": None}
    validate({"schema_version": 1, **document, "measured": measured}, schema)


def test_page_names_what_is_missing(document: dict[str, Any]) -> None:
    without_source = {**document, "recall": None, "parity": {**document["parity"], "with_checkpoints": False}}
    text = Page(render(without_source)).text
    assert text.count("Pass --target and --drafter") == 2
    assert "head is dense" in Page(render({**without_source, "two_stage": None})).text
    measured = {**document["measured"], "drafting": None}
    page = render({**document, "measured": measured})
    assert Page(page).text.count("no draft tokens") == 4
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    page = render({**without_source, "measured": None, "not_measured": "broken.onnx"})
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert "does not run" in Page(page).text
    assert Page(page).open == []


def test_rounds_of_a_text(bundle: Bundle) -> None:
    loaded = load_engine(bundle("e2b"), replace(read_manifest(bundle("e2b")), eos=frozenset()), threads=1)
    engine = ForcedEngine(loaded.manifest, loaded.graphs, loaded.tables)
    plain = generate_text(engine, [3, 4, 5], Options(40, 0))
    assert plain.tokens == list(generate(engine, [3, 4, 5], Options(40, 0), Stats()))
    assert [(len(done.drafts), done.accepted, len(done.tokens)) for done in plain.rounds] == [(0, 0, 1)] * 39
    engine.answer, engine.acceptance = plain.tokens, 0.7
    stats, text = Stats(), generate_text(engine, [3, 4, 5], Options(40, 4))
    engine.generator.seed(0)
    text = generate_text(engine, [3, 4, 5], Options(40, 4))
    engine.generator.seed(0)
    list(generate(engine, [3, 4, 5], Options(40, 4), stats))
    assert text.tokens == plain.tokens
    assert sum(text.drafted) == stats.accepted > 10
    assert [sum(len(done.drafts) > i for done in text.rounds) for i in range(4)] == stats.drafted_by_position
    rates = [row["accepted_share"] for row in acceptance([text])["by_position"]]
    assert rates == stats.acceptance_by_position
    assert tokens_per_round([text], 4)["mean"] == pytest.approx(stats.mean_tokens_per_round)
    at = 1
    for done in text.rounds:
        added = [True] * done.accepted + [False] * (len(done.tokens) - done.accepted)
        assert text.drafted[at : at + len(done.tokens)] == added
        at += len(done.tokens)


def test_an_end_token_ends_its_round(bundle: Bundle) -> None:
    manifest = read_manifest(bundle("e4b"))
    loaded = load_engine(bundle("e4b"), replace(manifest, eos=frozenset()), threads=1)
    tokens = generate_text(loaded, [3, 4, 5], Options(9, 0)).tokens
    at = next(i for i in range(2, 9) if tokens[i] not in tokens[:i])
    engine = ForcedEngine(replace(manifest, eos=frozenset({tokens[at]})), loaded.graphs, loaded.tables)
    engine.answer, engine.acceptance = [*tokens, 0, 0, 0, 0, 0, 0], 1.0
    text = generate_text(engine, [3, 4, 5], Options(9, 8))
    assert text.tokens == tokens[: at + 1]
    assert sum(len(done.tokens) for done in text.rounds) == at
    assert text.drafted[-1]


def test_counts_by_hand() -> None:
    rounds = [round_of(3, 0, 1), round_of(3, 2, 3), round_of(3, 3, 4), round_of(1, 1, 2)]
    text = Text([1] * 11, [False] * 11, rounds, 2.0)
    counts = acceptance([text])
    assert (counts["drafted"], counts["accepted"], counts["rate"]) == (10, 6, 0.6)
    rows = [[row[key] for key in ("drafted", "reached", "accepted")] for row in counts["by_position"]]
    assert rows == [[4, 4, 3], [3, 2, 2], [3, 2, 1]]
    assert [row["conditional"] for row in counts["by_position"]] == [0.75, 1.0, 0.5]
    counts = tokens_per_round([text], 3)
    assert [row["rounds"] for row in counts["distribution"]] == [1, 1, 1, 1]
    assert counts["mean"] == 2.5
    slow = Text([1] * 11, [False] * 11, [round_of(0, 0, 1)] * 10, 5.0)
    rates = speed({3: [[text], [text]], 0: [[slow], [replace(slow, decode_seconds=3.0)]]})
    assert [row["times_faster"] for row in rates["measured"]] == [1.0, 2.0]
    assert rates["measured"][1]["tokens_per_second"] == {"median": 5.0, "min": 5.0, "max": 5.0, "count": 2}
    assert rates["same_tokens"]
    assert not speed({0: [[slow]], 3: [[replace(text, tokens=[2] * 11)]]})["same_tokens"]


def test_gains_by_hand() -> None:
    assert speedups_from_tokens({1: 1.0, 2: 1.2, 4: 2.0}, 0.1, [1.5, 1.75]) == pytest.approx([1.5 / 1.3, 1.75 / 1.8])
    assert speedups_from_tokens({1: 1.0, 2: 1.2, 4: 2.0}, 0.1, [1.5, 1.75], 2) == pytest.approx([1.5 / 1.3, 1.75 / 2.2])
    assert draft_lengths(4, 8) == [1, 2, 4, 8]
    assert draft_lengths(3, 3) == [1, 2, 3]
    assert draft_lengths(0, 0) == []


def test_openings_are_texts_of_the_target(bundle: Bundle) -> None:
    engine = load_engine(bundle("e2b"), replace(read_manifest(bundle("e2b")), eos=frozenset()), threads=1)
    prompts = openings(engine, 2)
    assert prompts == openings(engine, 2)
    assert [(len(prompt), prompt[0]) for prompt in prompts] == [(13, engine.manifest.bos)] * 4
    assert len({tuple(prompt) for prompt in prompts}) == 4


def test_command(run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[ReportOptions] = []

    def measure_quickly(
        bundle: Path, pair: None, prompts: list[list[int]], options: ReportOptions, note: Any
    ) -> dict[str, Any]:
        chosen.append(options)
        return measure_report(bundle, pair, prompts, replace(options, seconds=0.01), note)

    monkeypatch.setattr("exporter.report.content.measure_report", measure_quickly)
    prompts, output, broken = tmp_path / "prompts.json", tmp_path / "report.html", tmp_path / "broken"
    prompts.write_text(json.dumps(PROMPTS))
    shutil.copytree(bundle("e2b"), broken)
    weights = bytearray((broken / "target.weights").read_bytes())
    weights[len(weights) // 2] ^= 1
    (broken / "target.weights").write_bytes(weights)
    arguments = (broken, "--output", output, "--prompt-ids", prompts, "--max-new-tokens", 6, "--threads", 1)
    code, out, err = run("report", *arguments, "--json")
    assert (code, err.splitlines()[-1]) == (1, "failed: parity: 1 of 3 checks failed, first files / sha256")
    document, page = json.loads(out), output.read_text()
    assert (document["threads"], chosen[0].max_new_tokens) == (1, 6)
    assert page == render(document)
    assert "did not pass parity" in page
    code, out, err = run("report", *arguments)
    assert (code, out) == (2, "")
    assert err == f"error: {output}: exists already; choose another file, or pass --force to replace it\n"
    assert output.read_text() == page
    (broken / "target.onnx").write_bytes(b"x" * (broken / "target.onnx").stat().st_size)
    code, out, err = run("report", *arguments, "--force")
    assert code == 1
    assert "does not run" in output.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "prompts.json", "report.html"]


def test_errors_are_one_line(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    path, output = bundle("e2b"), tmp_path / "report.html"
    prompts = tmp_path / "prompts.json"
    prompts.write_text("[[999999]]")
    for arguments, message in (
        ((path,), "--output"),
        ((tmp_path, "--output", output), "not a bundle"),
        ((path, "--output", tmp_path / "nowhere" / "x.html"), "its directory is missing"),
        ((path, "--output", output, "--target", tmp_path), "both --target and --drafter"),
        ((path, "--output", output, "--prompt-ids", prompts), "token id 999999"),
        ((path, "--output", output, "--prompt-ids", tmp_path / "none.json"), "none.json"),
        ((path, "--output", output, "--max-new-tokens", 2), "each text ends before a round with drafts"),
    ):
        code, out, err = run("report", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert message in err
    assert not output.exists()
