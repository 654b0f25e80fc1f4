"""The README's first command, and the job of docs/ci.md, run as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.demo import PAIR
from exporter.demo.synthetic import SyntheticPair
from exporter.parity import stages
from exporter.report.content import measure_report
from tests.conftest import Run
from tests.exporter.demo.test_synthetic import DRAFTER, TARGET

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOB = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/ci.md").read_text(encoding="utf-8"), re.S)


def test_demo(run: Run, tmp_path: Path) -> None:
    """It prints the README's texts, end tokens and sums of parity's checks; rates depend on the machine."""
    code, out, err = run("demo", "--output", tmp_path / "bundle")
    assert code == 0, err
    texts, table = re.findall(r"```\n(.*?)```", README, re.S)[1:3]
    for text in re.sub(r"(?m)^\d+ tokens .*\n", "", texts).strip().split("\n\n"):
        assert f"\n{text.strip()}\n" in out
    assert re.findall(r"(?m)^\d+ tokens \(\w+\)", texts) == re.findall(r"(?m)^\d+ tokens \(\w+\)", err)[1:]
    assert "% of drafts accepted" in err or "0 tokens/s" in err
    assert "FAIL" not in out
    assert out.count("PASS") == int(re.findall(r"parity: all (\d+) checks passed", err)[0])
    assert re.findall(r"parity: all \d+ checks passed", err) == re.findall(r"parity: all \d+ checks passed", table)
    assert (tmp_path / "bundle/manifest.json").exists()


def test_the_example_job_is_a_workflow(tmp_path: Path) -> None:
    assert JOB is not None
    (tmp_path / "job.yml").write_text(JOB[1])
    checker = Path(sys.executable).parent / "check-jsonschema"
    command = [checker, "--builtin-schema", "vendor.github-workflows", tmp_path / "job.yml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.usefixtures("few_held_out_texts")
def test_the_example_job_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small pair with a tokenizer, whose weights lie on a grid; with shorter answers than by default."""
    assert JOB is not None
    vocab = {"vocab_size": 2048}
    target, drafter = replace(TARGET, **vocab, vocab_size_per_layer_input=2048), replace(DRAFTER.text, **vocab)
    SyntheticPair(target, replace(DRAFTER, text=drafter), form="qat-q4_0").write(tmp_path / "pair")
    shutil.copy(PAIR / "target" / "tokenizer.json", tmp_path / "pair" / "target")
    measure_parity = stages.measure_parity

    def check_quickly(*arguments: Any) -> Any:
        *others, _, gate, note = arguments
        return measure_parity(*others, 8, gate, note)

    def measure_quickly(*arguments: Any) -> dict[str, Any]:
        *others, options, note = arguments
        return measure_report(*others, replace(options, seconds=0.01, max_new_tokens=8), note)

    monkeypatch.setattr(stages, "measure_parity", check_quickly)
    monkeypatch.setattr("exporter.report.content.measure_report", measure_quickly)
    monkeypatch.chdir(tmp_path)
    places = {"$TARGET": tmp_path / "pair" / "target", "$DRAFTER": tmp_path / "pair" / "drafter"}
    commands = re.findall(r"run: gemma-mtp-export (.*)", JOB[1])
    assert [command.split()[0] for command in commands] == ["export", "parity", "report"]
    for command in commands:
        words, _, file = command.partition(" > ")
        code, out, err = run(*(places.get(word, word) for word in shlex.split(words)))
        assert code == 0, err
        if file:
            Path(file).write_text(out)
    kept = re.findall(r"^ {12}(\S+)$", JOB[1], re.M)
    assert kept == ["bundle", "*.json", "parity.xml", "report.html"]
    assert all(list(tmp_path.glob(pattern)) for pattern in kept)
