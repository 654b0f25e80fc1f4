"""The command line as programs use it: JSON documents, exit codes, and bad input reported in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.exports import MAX_SEQ_LEN


@pytest.fixture
def ids(tmp_path: Path) -> Callable[[object], Path]:
    def write(value: object) -> Path:
        path = tmp_path / "ids.json"
        path.write_text(json.dumps(value))
        return path

    return write


def test_generate_json(run: Run, backend: str, bundle: Callable[..., Path], ids: Callable[[object], Path]) -> None:
    fields = {
        *(
            "tokens",
            "text",
            "thought",
            "tool_calls",
            "finish_reason",
            "rounds",
            "drafted",
            "accepted",
            "acceptance_rate",
        ),
        *("acceptance_by_position", "mean_tokens_per_round", "rounds_by_num_draft_tokens", "drafts_by_source"),
        *("reused_prompt_tokens", "prefill_seconds", "decode_seconds", "schema_version"),
        *("dropped_tokens", "tokens_left", "dropped_messages"),
    }
    path = ids([[3, 4, 5], [7]])
    common = ["generate", bundle("odd", backend), "--prompt-ids", path, "--max-new-tokens", 9, "--json"]
    code, out, _ = run(*common)
    speculative = json.loads(out)
    assert (code, len(speculative)) == (0, 2)
    assert all(result.keys() == fields and result["text"] is None for result in speculative)
    plain = json.loads(run(*common, "--mode", "plain")[1])
    assert [r["tokens"] for r in plain] == [r["tokens"] for r in speculative]
    assert all(r["drafted"] == 0 and r["acceptance_rate"] is None for r in plain)
    one = json.loads(run(*common[:3], ids([3, 4, 5]), *common[4:], "--num-draft-tokens", 2)[1])
    assert one["tokens"] == plain[0]["tokens"]
    assert one["drafted"] > 0


def test_generate_text(run: Run, bundle: Callable[..., Path]) -> None:
    code, out, err = run("generate", bundle("demo"), "--prompt", "Return the", "--max-new-tokens", 20)
    assert code == 0
    assert out.startswith("Return the")
    assert "tokens/s" in err
    assert "Traceback" not in err
    code, out, _ = run("generate", bundle("demo"), "--prompt", "Return the", "--max-new-tokens", 20, "--json")
    answer = json.loads(out)
    assert len(answer["tokens"]) <= 20
    assert answer["text"]


def test_sampled_text_depends_on_the_seed_alone(run: Run, bundle: Callable[[str], Path]) -> None:
    def sample(*more: object) -> list[int]:
        common = (
            "generate",
            bundle("demo"),
            "--prompt",
            "Return",
            "--max-new-tokens",
            24,
            "--temperature",
            1,
            "--json",
        )
        return json.loads(run(*common, *more)[1])["tokens"]

    assert sample("--seed", 1) == sample("--seed", 1, "--mode", "plain")
    assert sample("--seed", 1) != sample("--seed", 2)


def test_parity_exit_codes(
    run: Run,
    bundle: Callable[[str], Path],
    pair_dirs: Callable[[str], tuple[Path, Path]],
    ids: Callable[[object], Path],
) -> None:
    target, drafter = pair_dirs("dense")
    common = ("--prompt-ids", ids([5, 6]), "--max-new-tokens", 4)
    code, out, _ = run("parity", bundle("dense"), "--target", target, "--drafter", drafter, *common, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    other = pair_dirs("e2b")
    code, out, err = run("parity", bundle("dense"), "--target", other[0], "--drafter", other[1], *common)
    assert code == 2
    assert "was exported from another target: " in err


@pytest.mark.lowering
def test_inspect_shows_delegated_operations(run: Run, bundle: Callable[..., Path]) -> None:
    path = bundle("odd", "executorch")
    target = json.loads(run("inspect", path, "--json")[1])["backend"]["delegation"]["target"]
    assert target["delegated_ops_share"] == pytest.approx(
        target["delegated_ops"] / (target["delegated_ops"] + target["portable_ops"]), abs=1e-3
    )
    assert 0.5 < target["delegated_weight_bytes_share"] < 1
    _, out, _ = run("inspect", path)
    assert "index_put_ 4" in out


@pytest.mark.parametrize("directory_type", ["bundle", "target", "drafter"])
def test_inspect(
    directory_type: str, run: Run, bundle: Callable[[str], Path], pair_dirs: Callable[[str], tuple[Path, Path]]
) -> None:
    paths = {"bundle": bundle("e2b"), **dict(zip(("target", "drafter"), pair_dirs("e2b"), strict=True))}
    path = paths[directory_type]
    code, out, _ = run("inspect", path, "--json")
    document = json.loads(out)
    assert (code, document["kind"]) == (0, directory_type)
    assert document["total_bytes"] == sum(document["files"].values())
    assert run("inspect", path)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{dense}"], "give one of --prompt, --prompt-file and --prompt-ids"),
        (["generate", "{dense}", "--prompt", "hi"], "has no tokenizer.json; pass --prompt-ids"),
        (["generate", "{demo}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{dense}", "--prompt-ids", "{ids:[]}"], "a prompt is empty"),
        (["generate", "{dense}", "--prompt-ids", "{ids:[256]}"], "token id 256, expected 0 to 255"),
        (["generate", "{dense}", "--prompt-ids", "{ids:two}"], "prompt 2: the prompt has token id 256"),
        (["parity", "{dense}", "--prompt-ids", "{ids:two}"], "prompt 2: the prompt has token id 256"),
        (["generate", "{dense}", "--prompt-ids", "{ids:long}"], "the prompt has 600 tokens"),
        (["generate", "{dense}", "--prompt-ids", "{ids:words}"], "expected a JSON list of token ids"),
        (
            ["generate", "{dense}", "--prompt-ids", "nowhere.json"],
            "nowhere.json: not found; expected a list of token ids",
        ),
        (["generate", "{dense}", "--prompt-ids", "{ids:[5]}", "--num-draft-tokens", "9"], "was exported for up to 8"),
        (
            ["generate", "{dense}", "--prompt-ids", "{ids:[5]}", "--num-draft-tokens", "x"],
            "'x' is not a number of draft tokens; expected 'auto'",
        ),
        (["generate", "nowhere", "--prompt", "hi"], "nowhere: not a bundle"),
        (["inspect", "nowhere"], "nowhere: not found; pass the directory of a bundle or a checkpoint, or a session"),
        (["parity", "{dense}", "--target", "x"], "give both --target and --drafter"),
        (["export", "--target", "a", "--drafter", "b", "--output", "{dense}"], "exists already"),
        (["export", "--target", "a", "--drafter", "b", "--output", "c"], "a/config.json: not found"),
        (["export", "--target", "a"], "Missing option '--drafter'"),
        (["export", "--target", "a", "--drafter", "b", "--output", "x" * 300], "File name too long"),
        (["inspect", "x" * 300], "File name too long"),
        (["generate", "{dense}", "--prompt-ids", "{ids:[5]}", "--num-draft-tokens", "9" * 5000], "expected 'auto'"),
        (["generate", "{dense}", "--prompt-ids", "{ids:[5]}", "--temperature", "nan"], "temperature is nan"),
        (["generate", "{demo}", "--prompt", "a\udcffb"], "the prompt is not valid UTF-8"),
        (["bench", "{dense}", "--acceptance", "nan"], "'nan' is not a number"),
        (["bench", "{dense}", "--threads", "5000"], "5000 is not in the range 1<=x<=256"),
        (["parity", "{dense}", "--min-choices", "nan"], "'nan' is not a number"),
        (["parity", "{dense}", "--max-kl", "nan"], "'nan' is not a number"),
        (["cluster", "--drafter", "a", "--recall", "nan"], "'nan' is not a number"),
        (["recipe", "--target", "a", "--drafter", "b", "--target-bytes", "1e30"], "expected one such as 1.5e9, below"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, run: Run, bundle: Callable[[str], Path], ids: Callable[[object], Path]
) -> None:
    values = {"[]": [], "[256]": [256], "[5]": [5], "two": [[5], [256]], "long": [5] * 600, "words": ["a", "b"]}

    def fill(argument: str) -> object:
        if argument.startswith("{ids:"):
            return ids(values[argument[5:-1]])
        return bundle(argument[1:-1]) if argument.startswith("{") else argument

    code, out, err = run(*map(fill, arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_cluster_writes_a_table_for_export(
    run: Run, pair_dirs: Callable[[str], tuple[Path, Path]], ids: Callable[[object], Path], tmp_path: Path
) -> None:
    target, drafter = pair_dirs("dense")
    table, image, output = tmp_path / "table.safetensors", tmp_path / "recall.svg", tmp_path / "bundle"
    cluster = ("cluster", "--target", target, "--drafter", drafter, "--clusters", 50)
    code, out, _ = run(*cluster, "--output", table, "--report", image, "--json")
    document = json.loads(out)
    assert (code, document["num_clusters"], document["cluster_size"]) == (0, 50, 6)
    assert document["recall"] >= 0.99
    assert image.read_text().count("<svg") == 1
    common = ("--target", target, "--drafter", drafter, "--output", output, "--head", "kmeans")
    assert run("export", *common, "--cluster-table", table, "--max-seq-len", MAX_SEQ_LEN)[0] == 0
    two_stage = json.loads((output / "manifest.json").read_text())["two_stage"]
    assert two_stage["top_k_clusters"] == document["top_k_clusters"]
    code, out, _ = run("parity", output, *common[:4], "--prompt-ids", ids([5, 6]), "--max-new-tokens", 4, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    assert run(*cluster, "--output", table)[2].startswith(f"error: {table}: exists already;")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([[token, *range(token % 7, 250, 3)] for token in range(3, 40)]))
    code, out, _ = run(*cluster, "--output", table, "--force", "--text", texts)
    assert code == 0
    assert "chosen" in out
    assert "drafting on texts.json" in " ".join(out.split())


def test_export_keeps_as_many_clusters_as_the_option_says_in_the_default_recipe(
    run: Run, pair_dirs: Callable[[str], tuple[Path, Path]], ids: Callable[[object], Path], tmp_path: Path
) -> None:
    target, drafter = pair_dirs("e2b")
    common = ("--target", target, "--drafter", drafter)
    options = ("--top-k-clusters", 9, "--max-seq-len", MAX_SEQ_LEN, "--json")
    code, out, err = run("export", *common, "--output", tmp_path / "bundle", *options)
    assert (code, json.loads(out)["recipe"]) == (0, "int4")
    assert "\nrecipe int4: its 4-bit weights fit a phone; --recipe fp32 rounds nothing" in err
    assert json.loads(run("inspect", tmp_path / "bundle", "--json")[1])["two_stage"]["top_k_clusters"] == 9
    code, *_ = run("parity", tmp_path / "bundle", *common, "--prompt-ids", ids([5, 6]), "--max-new-tokens", 4)
    assert code == 0


CLUSTER_ERRORS = {
    "more clusters than tokens": (
        ("cluster", "--clusters", 257),
        r"257 clusters asked for, expected 1 to 256, the size of",
    ),
    "more clusters kept than made": (
        ("cluster", "--clusters", 8, "--top-k-clusters", 9),
        r"9 clusters are to be kept, expected 1 to 8, the clusters there are",
    ),
    "no clusters at all": (("cluster", "--clusters", 0), r"'--clusters'"),
    "recall of 0": (("cluster", "--recall", 0), r"'--recall'"),
    "prompts without a target": (("cluster", "--prompt-ids", "ids.json"), r"--prompt-ids and --adapter need --target"),
    "texts without a target": (("cluster", "--text", "t.txt"), r"--text, --prompt-ids and --adapter need --target"),
    "unknown image format": (("cluster", "--report", "recall.bmp"), r"recall.bmp: a picture's name ends in one of"),
    "no such directory": (("cluster", "--output", "absent/table"), r"absent/table: its directory is missing"),
    "two ways to choose": (("cluster", "--recall", 0.9, "--top-k-clusters", 3), r"give either --recall or"),
    "one file for both": (("cluster", "--output", "x.png", "--report", "./x.png"), r"name the same file"),
    "a device": (("cluster", "--output", "/dev/null", "--force"), r"/dev/null: exists and is not a file"),
    "more positions than the target has": (
        ("export", "--head", "kmeans", "--max-seq-len", 10**6),
        r"--max-seq-len is 1000000, but the target has 131072 positions",
    ),
    "clusters for another head": (("export", "--clusters", 8), r"go with --head kmeans"),
    "kept clusters of a dense head": (("export", "--top-k-clusters", 8), r"the head is dense; pass --head kmeans"),
    "no table": (
        ("export", "--head", "kmeans", "--cluster-table", "absent"),
        r"absent: not a readable cluster table .*; make one with `cluster --output`",
    ),
    "table and clusters": (
        ("export", "--head", "kmeans", "--cluster-table", "t", "--clusters", 8),
        r"leave out --clusters",
    ),
}


@pytest.mark.parametrize("name", CLUSTER_ERRORS)
def test_cluster_errors(
    name: str,
    run: Run,
    pair_dirs: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (command, *more), message = CLUSTER_ERRORS[name]
    target, drafter = pair_dirs("dense")
    pair = ("--target", target, "--output", "bundle") if command == "export" else ()
    code, out, err = run(command, "--drafter", drafter, *pair, *more)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_without_an_answer(run: Run, bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert out.startswith("Usage: ")

    def raising(error: BaseException) -> tuple[int, str, str]:
        def inspect(path: Path) -> None:
            raise error

        monkeypatch.setattr("exporter.cli.inspect_command.inspect_path", inspect)
        return run("inspect", bundle("dense"))

    assert raising(KeyboardInterrupt()) == (130, "", "\n")
    assert raising(OSError(28, "No space left on device", "a")) == (2, "", "error: a: No space left on device\n")
    code, out, err = raising(ModuleNotFoundError("no exporter.nowhere", name="exporter.nowhere"))
    assert (code, out) == (70, "")  # a fault of our own, not a missing extra
    assert err.startswith("error: unexpected ModuleNotFoundError: no exporter.nowhere")
