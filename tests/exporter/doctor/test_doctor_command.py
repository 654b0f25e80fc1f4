"""The `doctor` command, and its check of the chat template."""

import json
import shutil
from pathlib import Path

import pytest

from exporter.doctor.template import check_template
from runtime_ref.errors import InputError
from tests.conftest import Run
from tests.exporter.doctor.engines import Bundle, Pairs


def test_a_chat_template_is_missing(tmp_path: Path) -> None:
    target, bundle = tmp_path / "target", tmp_path / "bundle"
    target.mkdir()
    bundle.mkdir()
    assert check_template(bundle, target, []).verdict == "skipped"
    (target / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '<|turn>' }}"}))
    assert "has a template, the bundle has no" in check_template(bundle, target, []).detail
    (target / "chat_template.jinja").write_text("{{ '<|turn>user' }}")
    missing = check_template(bundle, target, [])
    assert missing.verdict == "finding"
    assert "has a template, the bundle has no" in missing.detail
    shutil.copy(target / "chat_template.jinja", bundle)
    assert check_template(bundle, target, [[5]]).verdict == "pass"  # without tokenizer.json, turn tokens are unknown
    added_tokens = [{"id": 105, "content": "<|turn>"}, {"id": 106, "content": "<turn|>"}, {"id": 2, "content": "<bos>"}]
    (bundle / "tokenizer.json").write_text(json.dumps({"added_tokens": added_tokens}))
    assert check_template(bundle, target, [[2, 105, 9]]).verdict == "pass"
    plain = check_template(bundle, target, [[2, 105, 9], [2, 9], [106]])
    assert plain.verdict == "finding"
    assert plain.detail.startswith("prompt 1, 2 has no <|turn>")
    (bundle / "chat_template.jinja").write_bytes(b"{{ '<|turn>user' }}\xff")
    assert check_template(bundle, target, [[2, 9]]).verdict == "finding"
    (bundle / "tokenizer.json").write_text("{}")
    assert check_template(bundle, target, [[2, 9]]).verdict == "pass"
    (bundle / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 105}]}))
    with pytest.raises(InputError, match="added_tokens are malformed \\(KeyError: 'content'\\); export"):
        check_template(bundle, target, [[2, 9]])


@pytest.mark.usefixtures("few_texts")
def test_doctor_command(run: Run, bundle: Bundle, pair_dirs: Pairs, tmp_path: Path) -> None:
    """Exit codes, the JSON document, and the line that names the most likely cause."""
    target, drafter = pair_dirs("odd")
    changed = shutil.copytree(target, tmp_path / "target")
    (ids := tmp_path / "ids.json").write_text("[[5, 6], [7]]")
    common = ("--drafter", drafter, "--prompt-ids", ids, "--max-new-tokens", 8)
    code, out, err = run("doctor", bundle("odd"), "--target", changed, *common, "--json")
    document = json.loads(out)
    assert (code, document["findings"]) == (0, 0)
    assert 0 <= document["acceptance_rate"] <= 1
    assert {"experiment", "verdict", "detail", "error", "least_change"} <= document["experiments"][0].keys()
    assert "none of 13 experiments found a cause" in err
    (changed / "chat_template.jinja").write_text("{{ '<|turn>user' }}")
    code, out, err = run("doctor", bundle("odd"), "--target", changed, *common)
    assert code == 1
    assert "FINDING" in out
    assert "failed: doctor: 1 finding, most likely chat template: " in err
    other, _ = pair_dirs("e4b")
    assert run("doctor", bundle("odd"), "--target", other, *common)[0] == 2
