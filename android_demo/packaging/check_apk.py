"""Checks of a built APK, with the tools in .packages: `check_apk.py APK BUNDLE`. Nothing is run.

Every check returns what it verified, or raises `WrongError` with one line; the exit status is 1 if any did.
"""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TOOLS = HERE / ".packages/apk-tools/bin"
MANIFEST = HERE / "app/src/main/AndroidManifest.xml"
GRADLE = HERE / "app/build.gradle.kts"
# Packages that the runtimes' own libraries bring: ours hold stand-ins, which no phone must get.
STAND_INS = ("Lai/onnxruntime/", "Lorg/pytorch/executorch/")


class WrongError(Exception):
    """One line: what was expected, and what was found."""


def output(*command: str | Path) -> str:
    """Standard output of a tool; `WrongError` with its last line if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        raise WrongError(f"{Path(command[0]).name}: expected exit status 0, found {done.returncode}: {lines[-1]}")
    return done.stdout


def expect(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise WrongError(f"{what}: expected {expected}, found {found}")


def searched(pattern: str, text: str, what: str) -> str:
    match = re.search(pattern, text)
    if not match:
        raise WrongError(f"{what}: expected a line like {pattern}, found none")
    return match[1]


@cache
def dex(apk: Path) -> str:
    """All that dexdump tells of the APK's classes, instructions included."""
    return output(TOOLS / "dexdump", "-d", "-f", apk)


def dex_files(apk: Path, bundle: Path) -> str:
    names = [name for name in zipfile.ZipFile(apk).namelist() if name.endswith(".dex")]
    expect("dex files", ["classes.dex"], names)
    text = dex(apk)
    classes = len(re.findall(r"^  Class descriptor  :", text, re.M))
    methods = len(re.findall(r"^      name          : .*\n      type          : '\(", text, re.M))
    header = searched(r"class_defs_size +: (\d+)", text, "dexdump")
    expect("classes listed, by the header", header, str(classes))
    return f"{classes} classes, {methods} methods"


def signature(apk: Path, bundle: Path) -> str:
    # From Android 9 on only v3 is looked at; 7 is the first that wants v2.
    text = output(TOOLS / "apksigner", "verify", "--verbose", "--print-certs", "--min-sdk-version", "24", apk)
    for scheme in ("v2", "v3"):
        line = rf"Verified using {scheme} scheme \(.*\): (\w+)"
        expect(f"signature {scheme}", "true", searched(line, text, "apksigner verify"))
    digest = searched(r"certificate SHA-256 digest: (\w+)", text, "apksigner verify")
    return f"signed by schemes v2 and v3, certificate {digest[:16]}"


def alignment(apk: Path, bundle: Path) -> str:
    output(TOOLS / "zipalign", "-c", "-p", "4", apk)
    return "aligned"


def instructions(apk: Path, bundle: Path) -> str:
    found = re.findall(r": (invoke-(?:custom|polymorphic)\S*)", dex(apk))
    expect("instructions that dx leaves for newer phones (invoke-custom, invoke-polymorphic)", 0, len(found))
    return "no invoke-custom, no invoke-polymorphic"


def badging(apk: Path, bundle: Path) -> str:
    """What an installer reads, against app/build.gradle.kts, the manifest and the string table."""
    text = output(TOOLS / "aapt", "dump", "badging", apk)
    build = GRADLE.read_text()
    keys = ("applicationId", "minSdk", "targetSdk")
    wanted = {key: searched(rf'\b{key} = "?([\w.]+)', build, str(GRADLE)) for key in keys}
    activity = searched(r"<activity[^>]*?android:name=\"([\w.]+)\"", MANIFEST.read_text(), str(MANIFEST))
    if activity.startswith("."):
        activity = wanted["applicationId"] + activity
    expect("package", wanted["applicationId"], searched(r"package: name='([^']*)'", text, "aapt"))
    expect("minimum SDK", wanted["minSdk"], searched(r"sdkVersion:'(\d+)'", text, "aapt"))
    expect("target SDK", wanted["targetSdk"], searched(r"targetSdkVersion:'(\d+)'", text, "aapt"))
    expect("launchable activity", activity, searched(r"launchable-activity: name='([^']*)'", text, "aapt"))
    label = searched(r"application-label:'([^']*)'", text, "aapt")
    strings = "".join(path.read_text() for path in (MANIFEST.parent / "res/values").glob("*.xml"))
    expect("label", label_in(strings), label)
    descriptor = f"'L{activity.replace('.', '/')};'"
    if f"Class descriptor  : {descriptor}" not in dex(apk):
        raise WrongError(f"classes: expected the launchable activity {activity}, found no such class")
    return f"{wanted['applicationId']} '{label}', activity {activity}, SDK {wanted['minSdk']} to {wanted['targetSdk']}"


def label_in(strings: str) -> str:
    """The label, which the manifest names by its resource or spells out."""
    name = searched(r"<application[^>]*?android:label=\"([^\"]*)\"", MANIFEST.read_text(), str(MANIFEST))
    if not name.startswith("@string/"):
        return name
    return searched(rf'<string name="{name.removeprefix("@string/")}"[^>]*>([^<]*)<', strings, name)


def stand_ins(apk: Path, bundle: Path) -> str:
    for line in re.findall(r"^  Class descriptor  : '(.*)'", dex(apk), re.M):
        if line.startswith(STAND_INS):
            raise WrongError(f"classes: expected none of the runtimes' (their libraries bring them), found {line}")
    return "no stand-in class"


def assets(apk: Path, bundle: Path) -> str:
    """The bundle's files inside the APK, against its manifest: sha256, and stored so that they can be mapped."""
    archive = zipfile.ZipFile(apk)
    folder = "assets/bundle/"
    inside = {name.removeprefix(folder): name for name in archive.namelist() if name.startswith(folder)}
    if "manifest.json" not in inside:
        raise WrongError(f"{apk.name}: expected assets/bundle/manifest.json, found none")
    found = archive.read(inside["manifest.json"])
    expect("assets/bundle/manifest.json", sha256((bundle / "manifest.json").read_bytes()), sha256(found))
    files = json.loads(found)["files"]
    expect("files of the bundle", sorted(files), sorted(set(inside) - {"manifest.json"}))
    for name, facts in files.items():
        expect(f"sha256 of assets/bundle/{name}", facts["sha256"], sha256(archive.read(inside[name])))
        if archive.getinfo(inside[name]).compress_type != zipfile.ZIP_STORED:
            raise WrongError(f"assets/bundle/{name}: expected it stored, found it compressed")
    return f"a bundle of {len(files)} files, as its manifest says, stored"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


CHECKS: tuple[Callable[[Path, Path], str], ...] = (
    signature,
    alignment,
    dex_files,
    instructions,
    stand_ins,
    badging,
    assets,
)


def main(apk: Path, bundle: Path) -> int:
    wrong = 0
    for check in CHECKS:
        try:
            print(f"  {check.__name__.replace('_', ' ')}: {check(apk, bundle)}")
        except (WrongError, zipfile.BadZipFile) as error:
            wrong += 1
            print(f"  {check.__name__.replace('_', ' ')}: WRONG: {error}")
    size = apk.stat().st_size / 1e6
    verdict = f"{wrong} of {len(CHECKS)} checks failed" if wrong else f"{len(CHECKS)} checks passed"
    print(f"packaging check of {apk} ({size:.1f} MB): {verdict}; nothing was run")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
