"""Checkpoints by their ids, from a server on the loopback."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from exporter.checkpoint.hub import local_checkpoint
from runtime_ref.errors import InputError
from tests.conftest import Directories, Run
from tests.exporter.checkpoint.hub_server import COMMIT, Hub, serve

Pairs = Callable[[str], Directories]
TARGET, DRAFTER = Path("acme/mini-E2B-it"), Path("acme/mini-E2B-it-assistant")
UNUSED = ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "original/params.json", "logo.png")


@pytest.fixture
def hub(pair_dirs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    target, drafter = pair_dirs("e2b")
    copied = shutil.copytree(target, tmp_path / "published")
    for name in UNUSED:
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(b"not needed")
    (copied / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    hub = Hub({str(TARGET): copied, str(DRAFTER): drafter})
    server = serve(hub)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # it keeps whole chunks when a connection breaks off
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


def test_the_whole_way(hub: Hub, tmp_path: Path, run: Run) -> None:
    """Exported by ids, a bundle tells where it comes from; a second command fetches nothing."""
    source = ["--target", f"{TARGET}@v1", "--drafter", DRAFTER]
    code, _, err = run("export", *source, "--output", tmp_path / "b", "--recipe", "fp32", "--max-seq-len", 64)
    assert code == 0, err
    assert f"{TARGET}: revision {COMMIT} in " in " ".join(err.split())
    origin = json.loads((tmp_path / "b" / "manifest.json").read_text())["source"]["target"]
    assert (origin["id"], origin["revision"], origin["license"]) == (str(TARGET), COMMIT, "apache-2.0")
    fetched = hub.fetched()
    assert "model.safetensors" in fetched and "README.md" in fetched and not {*UNUSED, "params.json"} & {*fetched}
    assert run("parity", tmp_path / "b", *source, "--max-new-tokens", 4)[0] == 0
    assert run("inspect", DRAFTER)[0] == 0
    assert hub.fetched() == fetched


def test_offline_what_is_in_the_cache_is_taken(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = local_checkpoint(TARGET)
    assert (directory / "model.safetensors").is_symlink() and directory.name == COMMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_checkpoint(TARGET) == directory
    assert local_checkpoint(Path(f"{TARGET}@{COMMIT}")) == directory
    (directory / "config.json").unlink()
    for checkpoint in (TARGET, DRAFTER):
        with pytest.raises(InputError, match=r"is not asked \(HF_HUB_OFFLINE\), and its files are not all in .*cache"):
            local_checkpoint(checkpoint)


def test_a_directory_comes_first(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / TARGET).mkdir(parents=True)
    for path in (TARGET, tmp_path / "missing", Path("acme/missing"), Path("../missing"), Path("other/..")):
        assert local_checkpoint(path) == path
    assert not hub.requests


@pytest.mark.parametrize("path", ["-x/y", "a--b/c", "x/y.", "x/y.git", "gemma/..", f"a/{'b' * 97}", "modèle/x"])
def test_what_is_no_id(path: str, hub: Hub, run: Run) -> None:
    assert local_checkpoint(Path(path)) == Path(path)
    code, _, err = run("export", f"--target={path}", "--drafter", DRAFTER, "--output", "b")
    assert (code == 2 and err.count("\n") == 1) or "revision" in err


def test_a_model_without_safetensors(hub: Hub) -> None:
    directory = hub.models[str(TARGET)]
    (directory / "model.safetensors").unlink()
    (directory / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"acme/mini-E2B-it: has no safetensors on http://127.*; give a model that has"
    ):
        local_checkpoint(TARGET)
    assert "tokenizer.model" in hub.fetched()


def test_a_connection_that_breaks_off_is_taken_up(hub: Hub) -> None:
    expected = (hub.models[str(TARGET)] / "model.safetensors").read_bytes()
    hub.broken["model.safetensors"] = 5000
    assert (local_checkpoint(TARGET) / "model.safetensors").read_bytes() == expected
    assert [asked for _, path, asked in hub.requests if path.endswith("model.safetensors")][-1] == "bytes=5000-"


def test_the_next_command_fetches_what_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(_: float) -> None:
        raise OSError("the network is gone")

    hub.broken["model.safetensors"] = 5000
    with monkeypatch.context() as patch:
        patch.setattr(file_download.time, "sleep", give_up)
        with pytest.raises(
            InputError, match=r"fetched from .* \(OSError: the network is gone\); run the command again"
        ):
            local_checkpoint(TARGET)
    whole = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*")}
    hub.requests.clear()
    assert (local_checkpoint(TARGET) / "model.safetensors").is_file()
    assert "config.json" in whole and not whole & {*hub.fetched()}


def test_a_server_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"http://127.0.0.1:9 cannot be reached \(\w+: .*\), and its files are not all"
    ):
        local_checkpoint(TARGET)


def test_content_that_is_not_what_is_listed(hub: Hub, tmp_path: Path, run: Run) -> None:
    """Sizes are right, so only the digest tells."""
    hub.spoilt.add("model.safetensors")
    code, _, err = run(
        "export", "--target", TARGET, "--drafter", DRAFTER, "--output", tmp_path / "b", "--recipe", "fp32"
    )
    assert code == 2 and re.search(r"model.safetensors: is not what the hub lists, [0-9a-f]{64}; remove", err)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("prepare", "checkpoint", "message"),
    [
        (lambda hub: hub.gated.add(str(TARGET)), TARGET, r"is gated; accept its terms on .*/acme/mini-E2B-it, and log"),
        (
            lambda hub: None,
            Path("acme/no-such"),
            r"no such directory, and no such model on .*; correct it, or, if it is",
        ),
        (lambda hub: None, Path(f"{TARGET}@v9"), r"acme/mini-E2B-it has no revision v9 on .*; give a branch, a tag"),
        (lambda hub: setattr(hub, "refuses", 418), TARGET, r"cannot be reached \(.*418"),
    ],
)
def test_refusals(
    prepare: Callable[[Hub], object], checkpoint: Path, message: str, hub: Hub, tmp_path: Path, run: Run
) -> None:
    prepare(hub)
    code, _, err = run("export", "--target", checkpoint, "--drafter", DRAFTER, "--output", tmp_path / "b")
    assert code == 2 and re.search(message, err) and err.count("\n") == 1, err


def test_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"acme/mini-E2B-it: no such directory; .* pip install 'gemma-mtp-export\[hub"):
        local_checkpoint(TARGET)
