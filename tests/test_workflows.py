"""The workflows of continuous integration: they run what a contributor runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_make_targets_that_exist(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = re.findall(r"\brun: (.*)", workflow.read_text(encoding="utf-8"))
    assert commands
    for command in commands:
        program, target, *_ = command.split()
        assert program == "make"
        assert target in targets


def test_constraints_hold_the_exact_versions_of_the_project() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = set(re.findall(r'"([\w-]+==[\w.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    assert len(exact) == 4
    assert exact <= set(constraints)
