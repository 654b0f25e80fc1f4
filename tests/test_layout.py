"""What import-linter (`make lint`) cannot hold of the layout: names that stand for one thing, and short modules."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("exporter", "clustering", "runtime_ref")

# Modules of exporter that bear the name of their counterpart in runtime_ref: what one writes, the other reads.
COUNTERPARTS = {"tables", "two_stage"}


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")


def test_a_module_name_stands_for_one_thing() -> None:
    names = [path.stem for path in modules("exporter")]
    assert sorted(names) == sorted(set(names))
    assert set(names) & {path.stem for package in PACKAGES[1:] for path in modules(package)} == COUNTERPARTS


def test_modules_stay_short() -> None:
    paths = [path for package in PACKAGES for path in modules(package)]
    assert [str(path) for path in paths if len(path.read_text().splitlines()) > 400] == []
