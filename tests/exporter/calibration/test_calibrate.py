"""Calibration: outputs nearer the checkpoint's, resumed after a kill, and a bundle that parity proves."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.bundle import export
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.bundle.inspection import inspect
from exporter.calibration import calibrate as module
from exporter.calibration.calibrate import calibrate
from exporter.checkpoint.pair import Pair, open_pair
from exporter.checkpoint.tensors import IntegerReader
from exporter.demo import PAIR
from exporter.files import kept_beside
from exporter.graphs.tables import PER_LAYER
from exporter.modeling.target import empty_kv
from exporter.parity.quality import kl_divergence, logits_after
from exporter.parity.reference import Reference
from exporter.parity.source import calibration_check, open_source
from exporter.parity.stages import run_parity
from exporter.quantization.numbers import Quantized, Scales
from exporter.quantization.recipes import RECIPES, Recipe, Rule
from exporter.quantization.widths import FLOAT
from exporter.texts import token_texts
from exporter.texts.token_texts import TokenTexts
from runtime_ref.errors import InputError
from runtime_ref.tokenizer import TextTokenizer
from tests.conftest import Run
from tests.exporter.checkpoint.forms import edit_json
from tests.exports import MAX_SEQ_LEN
from tests.rows import assert_rows_are_exact

Pairs = Callable[[str], tuple[Path, Path]]


def random_texts(count: int = 24, tokens: int = 40) -> TokenTexts:
    ids = torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(0))
    return TokenTexts(tuple(map(tuple, ids.tolist())), "random ids")


def logits_error(pair: Pair, recipe: Recipe, texts: TokenTexts) -> float:
    """Mean squared error of the target's logits, of the weights of a recipe against float32."""
    rounded, exact = (Reference(pair, r).target() for r in (recipe, RECIPES["fp32"]))
    errors = [(logits_after(rounded, t, len(t)) - logits_after(exact, t, len(t))).square().mean() for t in texts.texts]
    return float(torch.stack(errors).mean())


def off_its_grid(source: Path, output: Path) -> tuple[Path, Path]:
    """Copy the built-in pair with noise on its target's matrices, so that it is a trained pair on no grid."""
    shutil.copytree(source, output)
    file = output / "target/model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator) * 0.1 * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, file)
    return output / "target", output / "drafter"


def test_a_trained_pair_keeps_more_of_what_it_says(documents: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """Calibrated on texts of its kind, it diverges less on others; PLE in 3 bits, which stays as it is, has a part."""
    pair = open_pair(*off_its_grid(PAIR, tmp_path / "pair"))
    tokenizer = TextTokenizer(pair.target_checkpoint.directory, pair.tokens)
    encoded = [tokenizer.encode(text)[:48] for text in documents[1] if len(text) > 250]
    texts, others = TokenTexts(tuple(map(tuple, encoded[:40])), "documentation"), encoded[40:55]
    calibrated = calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path / "steps")
    exact = Reference(pair, RECIPES["fp32"]).target()
    divergences = []
    for rounded in (pair, calibrated):
        target = Reference(rounded, RECIPES["int4"]).target()
        logits = [(logits_after(exact, t, len(t)), logits_after(target, t, len(t))) for t in others]
        divergences.append(float(torch.cat([kl_divergence(*both) for both in logits]).mean()))
    nearest, tuned = divergences
    assert tuned < 0.8 * nearest


@pytest.mark.parametrize("name", ["e2b", "e4b"])
@pytest.mark.parametrize("recipe", ["int4", "smallest"])
def test_logits_are_nearer_the_checkpoints(name: str, recipe: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    """On other texts than those of the calibration; PLE in few bits, which is not calibrated, is left out of it."""
    pair = open_pair(*pair_dirs(name))
    texts, others = random_texts(), random_texts(4, 50)
    calibrated = calibrate(pair, RECIPES[recipe], Scales(), texts, tmp_path)
    names = calibrated.calibrated.matrices if calibrated.calibrated else ()
    assert names
    assert PER_LAYER not in names
    assert all(isinstance(calibrated.target_weights[name], IntegerReader) for name in names)
    rules = Rule(f"target.{PER_LAYER}", FLOAT), *RECIPES[recipe].rules
    without_ple = replace(RECIPES[recipe], rules=rules)
    # Of random weights and random tokens, few directions matter more than others.
    assert logits_error(calibrated, without_ple, others) < 0.98 * logits_error(pair, without_ple, others)


def test_a_matrix_is_rounded_by_the_inputs_that_rounded_layers_give(pair_dirs: Pairs, tmp_path: Path) -> None:
    """The sums of the last layer are those of the model with all other matrices rounded as they are stored."""
    pair, texts, seen = open_pair(*pair_dirs("e2b")), random_texts(), {}
    original = module.quantize_for

    def spy(weight: torch.Tensor, inputs: module.Inputs, *rest: object) -> Quantized:
        seen[weight.shape] = inputs
        return original(weight, inputs, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "quantize_for", spy)
        calibrated = calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path)
    # The head is calibrated last, on the states that everything before it gives.
    target = Reference(calibrated, RECIPES["int4"]).target()
    nearest = Reference(pair, RECIPES["int4"]).target()
    target.embed_tokens.weight = nearest.embed_tokens.weight  # its rows go in rounded to the nearest
    expected = torch.zeros(pair.target.hidden_size, pair.target.hidden_size)
    for text in texts.texts:
        kv = empty_kv(pair.target, len(text))
        state = target(torch.tensor(text), torch.tensor([0]), torch.arange(len(text)), kv).state
        expected += state.T @ state
    ((_, gram),) = seen[torch.Size((pair.target.vocab_size, pair.target.hidden_size))].parts
    expected.diagonal().add_(0.01 * expected.diagonal().mean())
    torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-2)


class Killed(BaseException):
    pass


def test_a_killed_calibration_goes_on_where_it_was(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair, texts = open_pair(*pair_dirs("e2b")), random_texts(6)
    whole = calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path / "whole")
    rounded: list[str] = []

    def stop_at(last: str, step: str, _: int) -> None:
        rounded.append(step)
        if step.startswith(last):
            raise Killed

    with pytest.raises(Killed):
        calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path / "killed", partial(stop_at, "layers.2."))
    done = set((tmp_path / "killed").glob("*.safetensors"))
    assert {file.stem for file in done} == {"projection", "layer-0", "layer-1"}
    times = {file: file.stat().st_mtime_ns for file in done}
    rounded.clear()
    resumed = calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path / "killed", partial(stop_at, "nothing"))
    assert not [step for step in rounded if step.startswith(("layers.0.", "layers.1."))]
    assert {file: file.stat().st_mtime_ns for file in done} == times
    assert whole.calibrated == resumed.calibrated
    for name in resumed.calibrated.matrices if resumed.calibrated else ():
        assert torch.equal(whole.target_weights[name](), resumed.target_weights[name]())
    # Of other texts, nothing is taken over; a file that was cut short counts as missing.
    rounded.clear()
    calibrate(pair, RECIPES["int4"], Scales(), random_texts(5), tmp_path / "killed", partial(stop_at, "nothing"))
    assert [step for step in rounded if step.startswith("layers.0.")]


def test_a_step_cut_short_is_done_again(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair, texts = open_pair(*pair_dirs("tiny")), random_texts(4)
    first = calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path)
    expected = {n: first.target_weights[n]() for n in (first.calibrated.matrices if first.calibrated else ())}
    file = tmp_path / "layer-1.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    second = calibrate(pair, RECIPES["int4"], Scales(), texts, tmp_path)
    assert all(torch.equal(second.target_weights[name](), matrix) for name, matrix in expected.items())


def test_steps_of_another_model_are_not_taken_over(pair_dirs: Pairs, tmp_path: Path) -> None:
    """Its config alone differs; nor is what else lies where steps are kept in the way."""
    pair, texts, directory = open_pair(*pair_dirs("tiny")), random_texts(4), tmp_path / "steps"
    directory.write_text("a file")
    calibrate(pair, RECIPES["int4"], Scales(), texts, directory)
    (directory / "key.json").write_bytes(b"\xff")
    first = calibrate(pair, RECIPES["int4"], Scales(), texts, directory)
    before = {n: first.target_weights[n]() for n in (first.calibrated.matrices if first.calibrated else ())}
    other = replace(pair, target=replace(pair.target, rms_norm_eps=1.0))
    second = calibrate(other, RECIPES["int4"], Scales(), texts, directory)
    assert before
    assert any(not torch.equal(second.target_weights[name](), matrix) for name, matrix in before.items())


def test_weights_on_their_grid_are_left_alone(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair = open_pair(*pair_dirs("demo"))
    assert calibrate(pair, RECIPES["int4"], Scales(), random_texts(2), tmp_path) is pair


def test_texts_are_not_written_again_after_a_kill(
    pair_dirs: Pairs, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are kept beside the output until it is written, for this checkpoint alone."""
    target, drafter = shutil.copytree(pair_dirs("tiny")[0], tmp_path / "target"), pair_dirs("tiny")[1]
    calls = []

    def write(pair: Pair, *_: object, **__: object) -> list[list[int]]:
        calls.append(pair.target_checkpoint.directory)
        return [[1, 7, 40, 3] * 40]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_texts, "write_texts", write)
    command = ["export", "--drafter", drafter, "--output", tmp_path / "b", "--recipe", "int4", "--target"]
    with monkeypatch.context() as patch:
        patch.setattr(export, "calibrate", killed)
        assert run(*command, target)[0] not in (0, 2)
    assert (tmp_path / ".b.kept/texts.json").is_file()
    other = shutil.copytree(target, tmp_path / "other")
    assert run(*command, other)[0] == 0
    assert calls == [target, other] and not (tmp_path / ".b.kept").exists()
    with monkeypatch.context() as patch:
        patch.setattr(export, "calibrate", killed)
        run(*command, target, "--force")
        calls.clear()
        run(*command, target, "--force")
        assert not calls
        # What decides about texts beside the weights: here tokens that are never written.
        edit_json(target / "generation_config.json", suppress_tokens=[9])
        run(*command, target, "--force")
        assert calls == [target]
    calls.clear()
    assert run(*command, target, "--force")[0] == 0 and not calls


def test_texts_are_those_of_an_adapter_as_it_is(pair_dirs: Pairs, tmp_path: Path) -> None:
    """Its config scales what its tensors add, so both decide whether texts and finished steps are still right."""
    adapter, (target, drafter) = tmp_path / "adapter", pair_dirs("tiny")
    adapter.mkdir()
    module = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    columns, rows = open_pair(target, drafter).target.hidden_size, open_pair(target, drafter).target.intermediate_size
    factors = {f"{module}A.weight": torch.ones(2, columns), f"{module}B.weight": torch.ones(rows, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    stamps = []
    for alpha in (16, 16, 17):
        edit_json(adapter / "adapter_config.json", peft_type="LORA", r=2, lora_alpha=alpha)
        stamps.append(json.dumps(open_pair(target, drafter, adapter_dirs=[adapter]).stamps))
    assert stamps[0] == stamps[1] != stamps[2]


def test_inputs_that_are_not_finite_are_refused(pair_dirs: Pairs, tmp_path: Path) -> None:
    pair = open_pair(*pair_dirs("tiny"))
    huge = {**pair.target_weights, "layers.0.input_layernorm.weight": lambda: torch.full((64,), 1e30)}
    with pytest.raises(
        InputError, match=r"the calibration give layers\.0\.self_attn\.q_proj\.weight inputs that are not"
    ):
        calibrate(replace(pair, target_weights=huge), RECIPES["int4"], Scales(), random_texts(2), tmp_path)


@pytest.mark.parametrize("backend", ["onnx", "executorch"])
@pytest.mark.parametrize("recipe", ["int4", "smallest"])
@pytest.mark.xdist_group("lowering tiny")
def test_parity_proves_a_calibrated_bundle(backend: str, recipe: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    """Its integers are read back from it: nothing else has them."""
    dirs, path = pair_dirs("tiny"), tmp_path / "bundle"
    texts = random_texts(4)
    export_bundle(open_pair(*dirs), path, ExportOptions(backend, RECIPES[recipe], MAX_SEQ_LEN, calibration=texts))
    assert not kept_beside(path).exists()
    entry = json.loads((path / "manifest.json").read_text())["calibration"]
    assert (entry["sha256"], entry["tokens"], entry["threads"]) == (texts.sha256, 160, 1)
    shown = inspect(path)
    assert shown["calibration"] == {**entry, "matrices": len(entry["matrices"])}
    assert "calibrated" not in shown["backend"]
    source = open_source(path, *dirs)
    checks = run_parity(path, source, [[1, 7, 40]], 8)
    assert [check for check in checks if not check.passed] == []
    assert len([check for check in checks if check.stage == "recipe"]) == 4
    assert_rows_are_exact(path)
    # Rows of a matrix in another order are another matrix.
    name = "layers.0.mlp.up_proj.weight"
    read = source.target_weights[name]
    assert isinstance(read, IntegerReader)
    blocks = [replace(b, numbers=b.numbers.flip(0), scales=b.scales.flip(0)) for b in read.quantized_blocks()]
    spoilt = replace(
        source,
        target_weights={**source.target_weights, name: IntegerReader(lambda: iter(blocks), read.width, read.columns)},
    )
    check = calibration_check(spoilt)
    assert (check.passed, name in check.detail) == (False, True)


def test_the_same_export_gives_the_same_bytes(pair_dirs: Pairs, tmp_path: Path) -> None:
    options = ExportOptions("onnx", RECIPES["int4"], MAX_SEQ_LEN, calibration=random_texts(4))
    digests = {export_bundle(open_pair(*pair_dirs("tiny")), tmp_path / name, options) for name in ("a", "b")}
    assert len(digests) == 1


def test_export_calibrates_where_it_matters(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    """By default on weights that lie on no grid, and not where nothing is rounded."""

    def export(name: str, *options: str) -> tuple[dict, str]:
        target, drafter = pair_dirs("tiny")
        arguments = "export", "--target", target, "--drafter", drafter, "--output", tmp_path / name, "--json", *options
        code, out, err = run(*arguments)
        assert code == 0, err
        return json.loads(out), err

    document, err = export("a")
    assert "calibrating 18 matrices on 4096 tokens: texts that the target wrote" in err
    assert len(document["calibrated"]) == 18
    assert document["warnings"] == []
    document, _ = export("b", "--no-calibrate")
    assert document["calibrated"] == []
    assert len(document["warnings"]) == 1
    document, err = export("c", "--recipe", "int8")
    assert document["calibrated"] == []
    assert 0 < len(document["folded"]) <= 6
    assert "calibrating the inputs of 6 sites" in err
    document, err = export("f", "--recipe", "fp32", "--calibrate")
    assert (document["calibrated"], document["folded"]) == ([], [])
    assert "nothing to calibrate" in err
    (tmp_path / "ids.json").write_text(json.dumps([list(range(3, 60))]))
    document, err = export("d", "--calibration", str(tmp_path / "ids.json"))
    assert document["warnings"] == [
        "ids.json: 58 tokens are few to calibrate matrices with 128 columns on, and rounding to the nearest may be"
        " better; give more text than columns"
    ]
    assert json.loads((tmp_path / "d/manifest.json").read_text())["calibration"]["texts"] == "ids.json"


def test_the_drafter_is_still_warned_of(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    """A calibration is of the target alone."""
    target, drafter = pair_dirs("dense")
    pair = "--target", target, "--drafter", drafter, "--output", tmp_path / "b"
    (tmp_path / "ids.json").write_text(json.dumps([list(range(3, 200))] * 2))
    code, out, _ = run("export", *pair, "--recipe", "smallest", "--calibration", tmp_path / "ids.json", "--json")
    assert code == 0
    (warning,) = json.loads(out)["warnings"]
    assert "of the drafter lie on no grid of 4 bits" in warning


def test_texts_are_read_before_anything_is_done(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("tiny")
    pair = "--target", target, "--drafter", drafter, "--output", tmp_path / "b"
    code, _, err = run("export", *pair, "--recipe", "fp32", "--calibration", tmp_path / "absent.json")
    assert (code, "absent.json" in err, err.count("\n")) == (2, True, 1)
    code, _, err = run("export", *pair, "--max-seq-len", 99999999)
    assert (code, "--max-seq-len is 99999999" in err, err.count("\n")) == (2, True, 1)


def test_a_damaged_graph_and_another_pair_are_told_as_ever(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    """Although parity reads a calibrated bundle's integers before its first stage."""
    dirs, path = pair_dirs("tiny"), tmp_path / "bundle"
    options = ExportOptions("onnx", RECIPES["int4"], MAX_SEQ_LEN, calibration=random_texts(2))
    export_bundle(open_pair(*dirs), path, options)
    others = pair_dirs("e2b")
    code, _, err = run("parity", path, "--target", others[0], "--drafter", others[1])
    assert (code, "was exported from another target" in err) == (2, True)
    graph = path / "target.onnx"
    graph.write_bytes(bytes(byte ^ 0x5A for byte in graph.read_bytes()))
    code, out, err = run("parity", path, "--target", dirs[0], "--drafter", dirs[1], "--json")
    failed = [check["output"] for check in json.loads(out)["checks"] if not check["passed"]]
    assert (code, failed) == (1, ["sha256", "loads and runs"])


def test_texts_and_no_calibration_contradict_each_other(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    target, drafter = pair_dirs("tiny")
    pair = "--target", target, "--drafter", drafter, "--output", tmp_path / "b"
    code, _, err = run("export", *pair, "--no-calibrate", "--calibration", tmp_path / "t.txt")
    assert (code, "leave out --no-calibrate" in err) == (2, True)


def test_a_manifest_that_lists_what_the_bundle_lacks_is_refused(run: Run, pair_dirs: Pairs, tmp_path: Path) -> None:
    dirs, path = pair_dirs("tiny"), tmp_path / "bundle"
    options = ExportOptions("onnx", RECIPES["int4"], MAX_SEQ_LEN, calibration=random_texts(2))
    export_bundle(open_pair(*dirs), path, options)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["calibration"]["matrices"] = ["layers.9.mlp.up_proj.weight"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run("parity", path, "--target", dirs[0], "--drafter", dirs[1])
    assert code == 2
    assert "calibration does not fit the files" in err
