"""Texts that are cancelled, closed or fail at random moments lose nothing, on both runtimes.

Run by `make android-test`; `make android-stress STEPS=10000 SEED=7` runs more of them.
"""

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"


@pytest.mark.parametrize(("name", "seed"), [("onnx-fp32", 1), ("onnx-int4", 2), ("executorch-fp32", 3)])
def test_nothing_is_lost_whatever_happens_in_a_turn(name: str, seed: int) -> None:
    command = ["bash", BUILD / "stress", BUILD / f"bundle-{name}", "67", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr  # the JVM warns about native code
    assert "=0" not in done.stdout  # each disturbance came before a text had ended
