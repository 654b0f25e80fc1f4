"""Whether a drafter fits a target that was trained further: its tokens, its base, what drafting gains."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exporter.checkpoint.pair import Pair, open_pair
from exporter.doctor import diagnosis
from exporter.doctor.diagnosis import diagnose
from exporter.doctor.drafter_fit import Gain, against_base, base_pair, drafting_gain
from exporter.doctor.study import CORRECT, Study
from runtime_ref.costs import Costs
from runtime_ref.errors import InputError
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import read_manifest
from tests.conftest import Run
from tests.exporter.checkpoint.forms import edit_json, edit_tensors
from tests.exporter.doctor.engines import NEW_TOKENS, Bundle, Pairs, load_bundle
from tests.exports import export
from tests.pairs import grown

LACKED, BEFORE = "tokens that the drafter lacks", "the target before its training"


def costs_of(verify: dict[int, float], step: float) -> Costs:
    costs = Costs(4)
    for drafts, seconds in verify.items():
        costs.record(drafts, seconds, drafts * step if drafts else None)
    return costs


def test_what_drafting_gains() -> None:
    costs = costs_of({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.6}, 0.1)
    rounds = [torch.tensor([4, 2]), torch.tensor([1, 0])]
    # With K = 2: 1 + 3/4 + 2/4 tokens in 1.2 + 0.2.
    assert drafting_gain(rounds, costs, 4) == Gain(2, pytest.approx(2.25 / 1.4))
    assert drafting_gain(rounds, costs, 1) == Gain(1, pytest.approx(1.75 / 1.2))
    assert drafting_gain([torch.zeros(5)], costs, 4) == Gain(0, 1.0)
    assert "gains nothing on these texts" in str(Gain(0, 1.0))
    assert "1.50 times as fast as plain decoding here, with K = 3" in str(Gain(3, 1.5))


@pytest.mark.parametrize(
    ("tuned", "before", "verdict"),
    [
        ([2, 2, 1, 2, 2, 1], [3, 2, 3, 2, 3, 3], "finding"),
        ([2.0] * 6, [2.19] * 6, "pass"),  # too little
        ([2.0] * 6, [2.21] * 6, "finding"),
        ([0, 4, 0, 4, 0, 2], [4, 0, 4, 1, 4, 1], "pass"),  # texts differ as much among themselves
        ([2] * 4, [3] * 4, "pass"),  # too few texts
        ([2], [3], "skipped"),
    ],
)
def test_a_training_is_blamed_for_a_clear_loss(tuned: list[float], before: list[float], verdict: str) -> None:
    """Each number is how many of four drafts a round of a text are accepted."""

    def study(accepted: list[float]) -> Any:
        rounds = [torch.tensor([number, number]) for number in accepted]
        return SimpleNamespace(rounds={CORRECT: rounds}, in_fp32=True)

    assert against_base(study(tuned), study(before)).verdict == verdict


def test_a_target_that_was_led_away_from_its_drafter(bundle: Bundle, pair_dirs: Pairs, tmp_path: Path) -> None:
    """One that was not is judged the same on both sides."""
    target, drafter = pair_dirs("demo")
    tuned = shutil.copytree(target, tmp_path / "tuned")
    torch.manual_seed(0)

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("down_proj.weight"):
                weight = tensors[name].float()
                tensors[name] = (weight + 3 * weight.std() * torch.randn(weight.shape)).bfloat16()

    edit_tensors(tuned, train)
    pair, manifest = open_pair(tuned, drafter), read_manifest(bundle("demo"))
    beginnings = [[manifest.bos, token] for token in range(300, 308)]

    def study(pair: Pair, engine: GraphEngine) -> Study:
        study = Study(engine, pair)
        for beginning in beginnings:
            study.add(beginning, 24, is_text=True)
        return study

    after = study(pair, load_bundle(export(tmp_path / "bundle", tuned, drafter, "onnx")))
    before = study(base_pair(pair, target), load_bundle(bundle("demo")))
    fallen, same = against_base(after, before), against_base(before, before)
    assert fallen.verdict == "finding", fallen.detail
    assert fallen.figures["gain"] > 0.05
    assert "its training led it away from the drafter" in fallen.detail
    assert same.verdict == "pass"
    assert same.figures["acceptance"] == same.figures["acceptance_before"] > 0.3


def test_a_base_of_other_sizes_is_refused(pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("odd")
    other = shutil.copytree(target, tmp_path / "other")
    edit_json(other / "config.json", rms_norm_eps=1e-5)
    larger = grown(target, tmp_path / "larger", 3)
    for base in (other, larger):
        with pytest.raises(InputError, match=r"--base .*er: has other sizes than .*; pass the checkpoint that"):
            base_pair(open_pair(target, drafter), base)


@pytest.mark.usefixtures("few_texts")
def test_a_vocabulary_that_has_grown(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    """Its tokens are chosen and verified, and never drafted; the doctor says how often they end a round."""
    target, drafter = pair_dirs("odd")
    larger = grown(target, tmp_path / "target", 5)
    source = ["--target", larger, "--drafter", drafter]
    code, _, err = run("export", *source, "--output", tmp_path / "b", "--recipe", "fp32", "--max-seq-len", 128)
    assert code == 0 and "has no rows for the last 5 tokens of the target" in " ".join(err.split())
    vocab = read_manifest(tmp_path / "b").raw["drafter"]["text"]["vocab_size"]
    (ids := tmp_path / "ids.json").write_text(json.dumps([[5, 6], [7, vocab + 1], [vocab + 4]]))
    assert run("parity", tmp_path / "b", *source, "--prompt-ids", ids, "--max-new-tokens", 8)[0] == 0
    texts = [
        json.loads(run("generate", tmp_path / "b", "--prompt-ids", ids, "--json", *mode)[1])
        for mode in (["--mode", "plain"], ["--num-draft-tokens", 4])
    ]
    assert [text["tokens"] for text in texts[0]] == [text["tokens"] for text in texts[1]]
    assert max(token for text in texts[0] for token in text["tokens"]) >= vocab
    engine = load_bundle(tmp_path / "b")
    engine.prefill([5, 6], diagnosis.Sampling())
    assert max(engine.draft(vocab + 2, 4)) < vocab
    diagnosed = diagnose(engine, open_pair(larger, drafter), [[5, 6]], NEW_TOKENS, base=open_pair(target, drafter))
    experiments = {e.experiment: e for e in diagnosed.experiments}
    lacked = experiments[LACKED]
    assert BEFORE in experiments and diagnosed.gain is not None
    assert lacked.figures["added_tokens"] == 5
    assert (lacked.verdict, lacked.figures["chosen"] > 0.05) == ("finding", True), lacked.detail
