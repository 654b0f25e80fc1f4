"""Rules of the layout that import-linter (`make lint`) does not check: module names, and the length of modules."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("exporter", "clustering", "runtime_ref")

# Modules of exporter with the name of their counterpart in runtime_ref: one writes what the other reads.
COUNTERPARTS = {"tables", "two_stage"}


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")


def test_each_module_has_a_name_of_its_own() -> None:
    names = [path.stem for path in modules("exporter")]
    assert sorted(names) == sorted(set(names))
    assert set(names) & {path.stem for package in PACKAGES[1:] for path in modules(package)} == COUNTERPARTS


def test_modules_stay_short() -> None:
    paths = [path for package in PACKAGES for path in modules(package)]
    assert [str(path) for path in paths if len(path.read_text().splitlines()) > 400] == []


def test_groups_of_tests_are_seen(request: pytest.FixtureRequest) -> None:
    """By pytest-xdist, which runs those of a group in one process if their ids end in it."""
    grouped = [(item, mark.args[0]) for item in request.session.items for mark in item.iter_markers("xdist_group")]
    if request.config.getoption("loadgroup", False):
        assert all(item.nodeid.endswith(f"@{group}") for item, group in grouped)
