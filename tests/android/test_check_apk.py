"""The packaging check on APKs that are wrong in one way each; the tools' answers are canned."""

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "android_demo/packaging/check_apk.py"
ANSWERS = {
    "apksigner": """Verified using v2 scheme (APK Signature Scheme v2): true
Verified using v3 scheme (APK Signature Scheme v3): true
Signer #1 certificate SHA-256 digest: 0123456789abcdef0123456789abcdef
""",
    "zipalign": "",
    "dexdump": """class_defs_size     : 1
  Class descriptor  : 'Lgemmamtp/demo/MainActivity;'
      name          : 'onCreate'
      type          : '(Landroid/os/Bundle;)V'
0001: invoke-virtual {v0}, Landroid/app/Activity;.finish:()V
""",
    "aapt": """package: name='gemmamtp.demo' versionCode='1'
sdkVersion:'28'
targetSdkVersion:'35'
application-label:'Gemma MTP'
launchable-activity: name='gemmamtp.demo.MainActivity'  label='' icon=''
""",
}
# tool, what it says, what it says instead, and what the check then says
LIES = [
    ("apksigner", "v2): true", "v2): false", "signature: WRONG: signature v2: expected true, found false"),
    ("apksigner", "v3): true", "v3): false", "signature: WRONG: signature v3: expected true, found false"),
    ("dexdump", "invoke-virtual", "invoke-custom", "instructions: WRONG: instructions that dx leaves"),
    ("dexdump", "invoke-virtual", "invoke-polymorphic", "instructions: WRONG: instructions that dx leaves"),
    ("dexdump", "size     : 1", "size     : 2", "dex files: WRONG: classes listed, by the header: expected 2, found 1"),
    ("dexdump", "demo/Main", "demo/Mean", "badging: WRONG: classes: expected the launchable activity"),
    ("dexdump", "'Lgemmamtp/demo/Main", "'Lai/onnxruntime/Main", "stand ins: WRONG: classes: expected no stand-in"),
    (
        "dexdump",
        "'Lgemmamtp/demo/Main",
        "'Lorg/pytorch/executorch/Main",
        "stand ins: WRONG: classes: expected no stand-in",
    ),
    ("dexdump", "'Lgemmamtp/demo/Main", "'Landroidx/work/Main", "stand ins: WRONG: classes: expected no stand-in"),
    ("aapt", "'gemmamtp.demo' v", "'other' v", "badging: WRONG: package: expected gemmamtp.demo, found other"),
    ("aapt", "'28'", "'26'", "badging: WRONG: minimum SDK: expected 28, found 26"),
    ("aapt", "'35'", "'34'", "badging: WRONG: target SDK: expected 35, found 34"),
    ("aapt", "MTP", "", "badging: WRONG: label: expected Gemma MTP, found Gemma"),
    ("aapt", "launchable-activity", "activity", "badging: WRONG: aapt: expected a line like launchable-activity"),
]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """check_apk.py with canned tools, beside a small demo of its own."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("check_apk", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = dict(ANSWERS)
    monkeypatch.setattr(module, "output", lambda tool, *_: answers[tool.name])
    (tmp_path / "res/values").mkdir(parents=True)
    (tmp_path / "res/values/strings.xml").write_text('<string name="app_name">Gemma MTP</string>')
    (tmp_path / "AndroidManifest.xml").write_text(
        '<application android:label="@string/app_name"> <activity android:name=".MainActivity"/></application>'
    )
    (tmp_path / "build.gradle.kts").write_text('applicationId = "gemmamtp.demo"\nminSdk = 28\ntargetSdk = 35\n')
    monkeypatch.setattr(module, "MANIFEST", tmp_path / "AndroidManifest.xml")
    monkeypatch.setattr(module, "GRADLE", tmp_path / "build.gradle.kts")
    module.answers = answers
    return module


def packed(folder: Path, content: bytes = b"rows", compress: int = 0, **more: bytes) -> tuple[Path, Path]:
    """An APK with a bundle of one file, and that bundle."""
    bundle = folder / "bundle"
    bundle.mkdir()
    facts = {"a.table": {"size": 4, "sha256": hashlib.sha256(b"rows").hexdigest()}}
    (bundle / "manifest.json").write_text(json.dumps({"files": facts}))
    with zipfile.ZipFile(folder / "demo.apk", "w", compress) as apk:
        apk.writestr("classes.dex", b"dex")
        apk.write(bundle / "manifest.json", "assets/bundle/manifest.json")
        apk.writestr("assets/bundle/a.table", content)
        for name, data in more.items():
            apk.writestr(name.replace("__", "/"), data)
    return folder / "demo.apk", bundle


def test_a_sound_apk_passes(check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(*packed(tmp_path)) == 0
    assert "7 checks passed; nothing was run" in capsys.readouterr().out


@pytest.mark.parametrize(("tool", "says", "instead", "line"), LIES)
def test_what_the_tools_find(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str, says: str, instead: str, line: str
) -> None:
    assert says in ANSWERS[tool]
    check.answers[tool] = ANSWERS[tool].replace(says, instead)
    assert check.main(*packed(tmp_path)) == 1
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"content": b"other"}, "assets: WRONG: sha256 of assets/bundle/a.table: expected "),
        ({"compress": zipfile.ZIP_DEFLATED}, "assets: WRONG: assets/bundle/a.table: expected it stored"),
        ({"assets__bundle__b.table": b""}, "assets: WRONG: files of the bundle: expected ['a.table'], found "),
        ({"lib__arm64-v8a__libx.so": b"elf"}, "demo.apk: lib/arm64-v8a/libx.so: not a library"),
        ({"classes2.dex": b""}, "dex files: WRONG: dex files: expected ['classes.dex'], found "),
    ],
)
def test_what_the_apk_holds(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict, line: str
) -> None:
    assert check.main(*packed(tmp_path, **wrong)) == 1
    assert line in capsys.readouterr().out


def test_a_bundle_exported_anew(check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apk, bundle = packed(tmp_path)
    (bundle / "manifest.json").write_text("{}")
    assert check.main(apk, bundle) == 1
    assert "WRONG: assets/bundle/manifest.json: expected " in capsys.readouterr().out
