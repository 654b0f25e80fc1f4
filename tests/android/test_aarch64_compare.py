"""What `make aarch64-parity` judges; the emulation itself is not run here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent.parent / "android_demo" / "aarch64"))
import compare

Main = Callable[..., tuple[int, str]]
TEXTS = [{"prompt": "a", "way": "greedy", "drafts": drafts, "tokens": [5, 6, 7]} for drafts in (0, 4)]


@pytest.fixture
def main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Main:
    """Compares two machines that agree, but for what is changed on the other one; gives exit status and output."""

    def compared(texts: list[dict[str, Any]] = TEXTS, off: float = 0.0, rows: int = 0, **facts: Any) -> tuple[int, str]:
        for side, said, change in (("x86_64", TEXTS, 0.0), ("there", texts, off)):
            (tmp_path / side).mkdir()
            path = tmp_path / side / "b"
            passes = [{"tokens": 3, "rows": 3, "differ": rows if side == "there" else 0, "state": 0.0}]
            about = {"machine": side, "recipe": "fp32", "row_multiple": 2, "seconds": 1.0, **facts}
            Path(f"{path}.json").write_text(json.dumps({"texts": said, "rows": passes, **about}))
            logits = np.array([[2.0, 1.0 + change]], np.float32)
            np.savez(f"{path}.npz", logits=logits, ids=np.array([[8, 9]]), state=np.zeros((1, 4), np.float32))
        status = compare.main(*(str(tmp_path / part) for part in ("x86_64", "there", "out.json")), "b")
        return status, capsys.readouterr().out

    return compared


def changed(*which: int) -> list[dict[str, Any]]:
    """The texts, with another last token in some of them."""
    return [{**text, "tokens": [5, 6, 8]} if i in which else text for i, text in enumerate(TEXTS)]


def test_differences_of_logits_are_reported(main: Main, tmp_path: Path) -> None:
    status, output = main(off=0.25)
    assert status == 0
    assert "2.5e-01" in output
    assert json.loads((tmp_path / "out.json").read_text())["b"]["between"]["largest_logit_difference"] == 0.25


def test_other_tokens_fail(main: Main) -> None:
    status, output = main(changed(0, 1))
    assert status == 1
    assert "DIFFERENT: b, here and on there: 'a' greedy, 4 drafts, from token 2 on" in output


def test_tokens_of_low_bit_recipes_are_only_reported(main: Main) -> None:
    status, output = main(changed(0, 1), recipe="int4")
    assert status == 0
    assert "note: b, here and on there: 'a' greedy, 0 drafts, from token 2 on" in output


def test_drafting_must_never_change_tokens(main: Main) -> None:
    status, output = main(changed(1), recipe="int4")
    assert status == 1
    assert "DIFFERENT: b, there, plain and speculative: 'a' greedy, from token 2 on" in output


def test_rows_must_not_depend_on_what_is_verified_with_them(main: Main) -> None:
    status, output = main(rows=2, recipe="int4")
    assert status == 1
    assert "DIFFERENT: b, there: 2 of 3 rows, alone and in a pass of 3 tokens" in output
