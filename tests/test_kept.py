"""What a kept trace or bundle is named by."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.config_json import read_target_config
from exporter.demo import PAIR
from exporter.graphs.spec import TargetGraph
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target
from tests.kept import _code, _structure, kept, kept_bundle


def test_kept_traces_depend_on_every_setting() -> None:
    """Of the configuration and of modules without parameters; the operations are in the digest of the sources."""
    config = read_target_config(PAIR / "target")

    def structure(ops: Ops = Ops(), cache_outputs: bool = True, **changes: object) -> str:
        with torch.device("meta"):
            return _structure(TargetGraph(Target(replace(config, **changes), ops), cache_outputs))  # type: ignore[arg-type]

    same = structure()
    assert same == structure() == structure(Ops(linear=lambda x, weight: x @ weight.T))
    assert same != structure(sliding_window=config.sliding_window + 1)
    assert same != structure(rms_norm_eps=1e-5)
    assert same != structure(final_logit_softcapping=None)
    assert same != structure(cache_outputs=False)

    class Longer(TargetGraph):
        """Of the same name, attributes and parameters as its base, from another file."""

    Longer.__qualname__ = "TargetGraph"
    with torch.device("meta"):
        assert same != _structure(Longer(Target(config)))


def test_kept_names_ignore_comments(tmp_path: Path) -> None:
    texts = ['"""Doc."""\nx = 1  # one\n', "x = 1\n", '"""Doc."""\n\n\ndef f():\n    """Doc."""\n    return 1\n']
    files = [tmp_path / f"{number}.py" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    first, second, third = map(_code, files)
    assert first == second != third
    (tmp_path / "other.py").write_text("def f():\n    return 2\n")
    assert _code(tmp_path / "other.py") != third


def test_kept_bundles_are_made_once_for_the_same_inputs(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.mkdir()

    checkpoint, other = tmp_path / "a", tmp_path / "b"
    for directory, content in ((checkpoint, "1"), (other, "2")):
        directory.mkdir()
        (directory / "weights").write_text(content)
    keep = tmp_path / "kept"
    paths = [kept_bundle(keep, make, d, recipe) for d in (checkpoint, other) for recipe in ("int4", "int4", "fp32")]
    assert len(made) == len(set(paths)) == 4
    assert paths[0] == paths[1]


def test_what_could_not_be_made_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with pytest.raises(RuntimeError), kept(path) as missing:
        assert missing
        raise RuntimeError
    with kept(path) as missing:
        assert missing
        path.touch()
    with kept(path) as missing:
        assert not missing
