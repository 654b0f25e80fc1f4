"""The Gradle build, read without Gradle: its scripts and its version catalog must agree."""

import hashlib
import re
import tomllib
from pathlib import Path

import pytest

ANDROID = Path(__file__).parents[2] / "android_demo"
SCRIPTS = sorted(ANDROID.glob("*.gradle.kts")) + sorted(ANDROID.glob("*/build.gradle.kts"))
CATALOG = tomllib.loads((ANDROID / "gradle/libs.versions.toml").read_text())
PYPROJECT = tomllib.loads((ANDROID.parent / "pyproject.toml").read_text())


def accessors(section: str, prefix: str) -> set[str]:
    """What a script writes for each entry: `kotlin-test-junit` is `libs.kotlin.test.junit`."""
    return {prefix + re.sub("[-_]", ".", alias) for alias in CATALOG[section]}


def used(text: str) -> set[str]:
    return set(re.findall(r"\blibs(?:\.\w+)+", re.sub("//.*", "", text)))


def test_scripts_use_only_what_the_catalog_has_and_all_of_it() -> None:
    asked = set().union(*(used(path.read_text()) for path in SCRIPTS))
    assert asked == accessors("plugins", "libs.plugins.") | accessors("libraries", "libs.")


@pytest.mark.parametrize("section", ["plugins", "libraries"])
def test_every_entry_names_a_version_that_is_there(section: str) -> None:
    assert {entry["version"]["ref"] for entry in CATALOG[section].values()} <= set(CATALOG["versions"])


def test_modules_are_the_folders_with_a_build_script() -> None:
    included = re.findall(r'":([\w-]+)"', (ANDROID / "settings.gradle.kts").read_text())
    assert sorted(included) == sorted(path.parent.name for path in ANDROID.glob("*/build.gradle.kts"))
    projects = {name for path in SCRIPTS for name in re.findall(r'project\(":([\w-]+)"\)', path.read_text())}
    assert projects <= set(included)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ANDROID)))
def test_scripts_close_what_they_open(script: Path) -> None:
    text = re.sub(r'//.*|"[^"\n]*"', "", script.read_text())
    assert all(text.count(opening) == text.count(closing) for opening, closing in ("{}", "()", "[]"))


def test_runtimes_read_what_the_exporter_writes() -> None:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["executorch"]]
    dependencies = dict(re.split("==|>=", line) for line in lines)
    assert CATALOG["versions"]["executorch"] == dependencies["executorch"]
    assert CATALOG["versions"]["onnxruntime"].startswith(f"{dependencies['onnxruntime']}.")


def test_the_library_has_the_version_of_the_exporter_and_is_compiled_as_in_the_host_tests() -> None:
    build = (ANDROID / "build.gradle.kts").read_text()
    assert f'version = "{PYPROJECT["project"]["version"]}"' in build
    options = re.search(r"LIBRARY_OPTIONS := (.*)", (ANDROID / "hosttest/host.mk").read_text())
    language = re.findall(r"Version.set\(KotlinVersion.KOTLIN_(\d)_(\d)\)", build)
    assert options is not None
    assert language == [tuple(version.split(".")) for version in re.findall(r"-version (\S+)", options[1])]


def test_kotlin_is_the_compiler_of_the_host_tests() -> None:
    assert f"kotlin-compiler@{CATALOG['versions']['kotlin']}\n" in (ANDROID / "tools/packages.sh").read_text()


def test_the_wrapper_is_gradles_own() -> None:
    jar = (ANDROID / "gradle/wrapper/gradle-wrapper.jar").read_bytes()
    assert hashlib.sha256(jar).hexdigest() == "7d3a4ac4de1c32b59bc6a4eb8ecb8e612ccd0cf1ae1e99f66902da64df296172"
