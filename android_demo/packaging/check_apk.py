"""Check a built APK with the tools in .packages: `check_apk.py APK BUNDLE`. The app is not run.

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

from check_pages import wrong_in

HERE = Path(__file__).resolve().parent.parent
TOOLS = HERE / ".packages/apk-tools/bin"
MANIFEST = HERE / "app/src/main/AndroidManifest.xml"
GRADLE = HERE / "app/build.gradle.kts"
# Packages with stand-ins or stubs, which must not be in an APK: libraries and phones bring the real ones.
STAND_INS = ("Lai/onnxruntime/", "Lorg/pytorch/executorch/", "Landroid/", "Landroidx/", "Lcom/google/common/")


class WrongError(Exception):
    """A check that failed: one line with what was expected and what was found."""


def output(*command: str | Path) -> str:
    """Return the standard output of a tool; raises `WrongError` with its last line if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise WrongError(f"{Path(command[0]).name}: expected exit status 0, found {done.returncode}: {lines[-1]}")
    return done.stdout


def expect(what: str, expected: object, actual: object) -> None:
    """Raise `WrongError` if two values differ."""
    if expected != actual:
        raise WrongError(f"{what}: expected {expected}, found {actual}")


def searched(pattern: str, text: str, what: str) -> str:
    """Return the first group of a pattern in a text; raises `WrongError` if it does not match."""
    match = re.search(pattern, text)
    if not match:
        raise WrongError(f"{what}: expected a line like {pattern}, found none")
    return match[1]


@cache
def dex(apk: Path) -> str:
    """Return the output of dexdump for the APK's classes, with instructions."""
    return output(TOOLS / "dexdump", "-d", "-f", apk)


def dex_files(apk: Path, bundle: Path) -> str:
    """Check that there is one dex file, and that dexdump lists all of its classes."""
    names = [name for name in zipfile.ZipFile(apk).namelist() if name.endswith(".dex")]
    expect("dex files", ["classes.dex"], names)
    text = dex(apk)
    classes = len(re.findall(r"^  Class descriptor  :", text, re.M))
    methods = len(re.findall(r"^      name          : .*\n      type          : '\(", text, re.M))
    header = searched(r"class_defs_size +: (\d+)", text, "dexdump")
    expect("classes listed, by the header", header, str(classes))
    return f"{classes} classes, {methods} methods"


def signature(apk: Path, bundle: Path) -> str:
    """Check the signatures of schemes v2 and v3."""
    # Android 9 and later check v3 only; Android 7 is the first that checks v2.
    text = output(TOOLS / "apksigner", "verify", "--verbose", "--print-certs", "--min-sdk-version", "24", apk)
    for scheme in ("v2", "v3"):
        line = rf"Verified using {scheme} scheme \(.*\): (\w+)"
        expect(f"signature {scheme}", "true", searched(line, text, "apksigner verify"))
    digest = searched(r"certificate SHA-256 digest: (\w+)", text, "apksigner verify")
    return f"signed by schemes v2 and v3, certificate {digest[:16]}"


def alignment(apk: Path, bundle: Path) -> str:
    """Check that files in the APK are aligned, and native libraries to pages of 16 KB; this build packs none."""
    output(TOOLS / "zipalign", "-c", "-p", "4", apk)
    count, wrong = wrong_in(apk)
    if wrong:
        raise WrongError(wrong[0])
    return f"aligned, {count} native libraries"


def instructions(apk: Path, bundle: Path) -> str:
    """Check that the code has no instructions that older phones lack."""
    newer = re.findall(r": (invoke-(?:custom|polymorphic)\S*)", dex(apk))
    expect("instructions that dx leaves for newer phones (invoke-custom, invoke-polymorphic)", 0, len(newer))
    return "no invoke-custom, no invoke-polymorphic"


def badging(apk: Path, bundle: Path) -> str:
    """Check what an installer reads against app/build.gradle.kts, the manifest and the string table."""
    text = output(TOOLS / "aapt", "dump", "badging", apk)
    build = GRADLE.read_text()
    keys = ("applicationId", "minSdk", "targetSdk")
    expected = {key: searched(rf'\b{key} = "?([\w.]+)', build, str(GRADLE)) for key in keys}
    activity = searched(r"<activity[^>]*?android:name=\"([\w.]+)\"", MANIFEST.read_text(), str(MANIFEST))
    if activity.startswith("."):
        activity = expected["applicationId"] + activity
    expect("package", expected["applicationId"], searched(r"package: name='([^']*)'", text, "aapt"))
    expect("minimum SDK", expected["minSdk"], searched(r"sdkVersion:'(\d+)'", text, "aapt"))
    expect("target SDK", expected["targetSdk"], searched(r"targetSdkVersion:'(\d+)'", text, "aapt"))
    expect("launchable activity", activity, searched(r"launchable-activity: name='([^']*)'", text, "aapt"))
    label = searched(r"application-label:'([^']*)'", text, "aapt")
    strings = "".join(path.read_text() for path in (MANIFEST.parent / "res/values").glob("*.xml"))
    expect("label", label_in(strings), label)
    descriptor = f"'L{activity.replace('.', '/')};'"
    if f"Class descriptor  : {descriptor}" not in dex(apk):
        raise WrongError(f"classes: expected the launchable activity {activity}, found no such class")
    sdks = f"{expected['minSdk']} to {expected['targetSdk']}"
    return f"{expected['applicationId']} '{label}', activity {activity}, SDK {sdks}"


def label_in(strings: str) -> str:
    """Return the app's label, which the manifest has as a text or as the name of a string."""
    name = searched(r"<application[^>]*?android:label=\"([^\"]*)\"", MANIFEST.read_text(), str(MANIFEST))
    if not name.startswith("@string/"):
        return name
    return searched(rf'<string name="{name.removeprefix("@string/")}"[^>]*>([^<]*)<', strings, name)


def stand_ins(apk: Path, bundle: Path) -> str:
    """Check that no stand-in of a runtime's class is packed."""
    for line in re.findall(r"^  Class descriptor  : '(.*)'", dex(apk), re.M):
        if line.startswith(STAND_INS):
            raise WrongError(f"classes: expected no stand-in, found {line}")
    return "no stand-in class"


def assets(apk: Path, bundle: Path) -> str:
    """Check the sha256 of the bundle's files in the APK, and that they are stored without compression."""
    archive = zipfile.ZipFile(apk)
    folder = "assets/bundle/"
    inside = {name.removeprefix(folder): name for name in archive.namelist() if name.startswith(folder)}
    if "manifest.json" not in inside:
        raise WrongError(f"{apk.name}: expected assets/bundle/manifest.json, found none")
    manifest = archive.read(inside["manifest.json"])
    expect("assets/bundle/manifest.json", sha256((bundle / "manifest.json").read_bytes()), sha256(manifest))
    files = json.loads(manifest)["files"]
    expect("files of the bundle", sorted(files), sorted(set(inside) - {"manifest.json"}))
    for name, metadata in files.items():
        expect(f"sha256 of assets/bundle/{name}", metadata["sha256"], sha256(archive.read(inside[name])))
        if archive.getinfo(inside[name]).compress_type != zipfile.ZIP_STORED:
            raise WrongError(f"assets/bundle/{name}: expected it stored, found it compressed")
    return f"a bundle of {len(files)} files, with the manifest's digests, stored"


def sha256(data: bytes) -> str:
    """Return a hexadecimal digest."""
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
    """Run all checks and print their results; returns the exit status."""
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
