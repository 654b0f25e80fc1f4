"""Documents: their links lead somewhere, and those that should be short are."""

import pkgutil
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "docs/", "docs/decisions/", "runtime_ref/", "android_demo/", "android_demo/ios/", "exporter/demo/pair/")
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors that Markdown renderers give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for name, anchor in LINK.findall(text):
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), name
        if anchor:
            assert anchor in anchors(linked), f"{name}#{anchor}"


@pytest.mark.parametrize(("name", "max_words"), [("README.md", 1800), ("CONTRIBUTING.md", 1500)])
def test_entrances_are_short(name: str, max_words: int) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= max_words


def test_links_of_the_readme_work_where_it_is_shown_alone() -> None:
    absolute_links = runpy.run_path(str(ROOT / "setup.py"))["absolute_links"]
    text = absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), "https://host/owner/name/blob/main")
    assert "](https://host/owner/name/blob/main/docs/concepts.md)" in text
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []
    assert "docs/round.svg?raw=true)" in text


def test_documents_name_tests_and_modules_that_exist() -> None:
    """`pytest -k WORDS`, `test_NAME.py` and `python -m MODULE`, as decisions give them for their evidence."""
    files = list((ROOT / "tests").rglob("*.py"))
    names = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}
    words = names | {str(file.relative_to(ROOT)) for file in files}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        expressions = re.findall(r"pytest[^`\n]* -k (\"[^\"]+\"|\w+)", text)
        for word in re.findall(r"\w+", " ".join(expressions)):
            assert word in ("or", "and", "not", "WORDS") or any(word in name for name in words), (
                f"{page.name}: -k {word}"
            )
        for name in re.findall(r"\b(test_\w+\.py)\b", text):
            assert any(file.name == name for file in files) or (ROOT / "android_demo/hosttest" / name).exists(), name
        for module in re.findall(r"python -m (exporter[\w.]+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: {module}"


def test_docstrings_name_what_exists() -> None:
    """Names such as `runtime_ref.tables.Table` between backticks, in modules and documents."""
    sources = [path for package in ("exporter", "clustering", "runtime_ref") for path in (ROOT / package).rglob("*.py")]
    for source in [*sources, *PAGES]:
        if source.name == "CHANGELOG.md":  # it names what is gone
            continue
        for name in re.findall(
            r"`((?:exporter|clustering|runtime_ref)\.[\w.]*\w)`", source.read_text(encoding="utf-8")
        ):
            assert pkgutil.resolve_name(name) is not None, f"{source.name}: {name}"
