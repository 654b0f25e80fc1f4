"""Clusters made for a drafter: fitted on its own states, and kept by recall with almost no loss of acceptance."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clustering.recall import best_logits, cluster_ranks, recall_curve
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.config_json import read_drafter_config
from exporter.checkpoint.pair import Pair, open_pair
from exporter.checkpoint.tensors import Checkpoint
from exporter.heads.clusters import ClusterOptions, make_clusters
from exporter.heads.states import drafting_states, states_without_target
from exporter.parity.drafting import DRAFT_STEPS
from exporter.parity.source import open_source
from exporter.parity.stages import run_parity
from exporter.quantization.recipes import RECIPES
from exporter.texts.token_texts import TokenTexts
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine, open_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer
from tests.conftest import Run
from tests.exporter.checkpoint.forms import edit_tensors
from tests.exports import MAX_SEQ_LEN
from tests.pairs import to_published

Directories = tuple[Path, Path]
Pairs = Callable[[str], Directories]
Documents = tuple[list[str], list[str]]


def documentation(pair: Pair, documents: Documents) -> TokenTexts:
    """Text of the kind that the built-in pair learnt, for less time than the default texts take."""
    tokenizer = TextTokenizer(pair.target_checkpoint.directory, pair.tokens)
    texts = (tokenizer.encode(text)[:64] for text in documents[0] if len(text) > 300)
    return TokenTexts(tuple(tuple(text) for text, _ in zip(texts, range(32), strict=False)), "documentation")


@pytest.mark.parametrize("published", [False, True], ids=["float32", "bfloat16 shards"])
def test_states_are_those_of_drafting(published: bool, pair_dirs: Pairs, tmp_path: Path) -> None:
    """The best tokens of the states after each token of a prompt are the drafts of a bundle with a dense head."""
    target, drafter = pair_dirs("e2b")
    if published:
        target = to_published(target, tmp_path / "published")
    pair = open_pair(target, drafter, "dense")
    prompt = [(7 * i * i + 11 * i + 5) % 256 for i in range(150)]  # past the window, in two chunks
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where bfloat16 and float32 are mixed
        states = drafting_states(pair, [prompt], lambda: None).reshape(len(prompt), DRAFT_STEPS, -1)
    rows = pair.drafter_weights["head.weight"]()
    export_bundle(pair, tmp_path / "bundle", ExportOptions("onnx", RECIPES["fp32"], max_seq_len=MAX_SEQ_LEN))
    engine = load_engine(tmp_path / "bundle", read_manifest(tmp_path / "bundle"), threads=1)
    for length in (1, 2, 20, 128, 129, 150):
        (last,) = engine.prefill(prompt[:length], Sampling()).tokens
        assert (states[length - 1] @ rows.T).argmax(-1).tolist() == engine.draft(last, DRAFT_STEPS)


def test_states_of_a_drafter_alone(pair_dirs: Pairs) -> None:
    """They need no target, and centroids fitted on them have a higher recall than mean rows in real drafting."""
    target, drafter = pair_dirs("demo")
    made = make_clusters(drafter, None, ClusterOptions(64))
    assert made.states == "the drafter alone on random input"
    pair = open_pair(target, drafter, "dense")
    prompts = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(1)).tolist()
    states = drafting_states(pair, prompts, lambda: None).numpy()
    rows = pair.drafter_weights["head.weight"]().numpy()
    members = made.table.members
    best = best_logits(states, rows, members)
    fitted, means = (
        recall_curve(cluster_ranks(states, best, centroids), 64)[7]
        for centroids in (made.table.centroids, rows[members].mean(1))
    )
    assert fitted > means + 0.02
    config, checkpoint = read_drafter_config(drafter), Checkpoint(drafter)
    assert states_without_target(checkpoint, config).equal(states_without_target(checkpoint, config))


def test_recall_chooses_how_many_clusters_to_keep(pair_dirs: Pairs, documents: Documents) -> None:
    target, drafter = pair_dirs("demo")
    pair = open_pair(target, drafter)
    texts = documentation(pair, documents)
    made = {recall: make_clusters(drafter, pair, ClusterOptions(64, recall=recall), texts) for recall in (0.9, 0.99)}
    for recall, clustering in made.items():
        assert clustering.recall[clustering.top_k - 1] >= recall > clustering.recall[clustering.top_k - 2]
        assert np.all(np.diff(clustering.recall) >= 0)
        assert clustering.recall[-1] == 1
    assert np.array_equal(made[0.9].table.centroids, made[0.99].table.centroids)
    assert made[0.9].checkpoint_recall is not None


def test_clusters_cost_next_to_no_drafts(pair_dirs: Pairs, documents: Documents, tmp_path: Path) -> None:
    """On the built-in pair: the same text, acceptance within 2 points of a dense head's, a quarter of its work."""
    target, drafter = pair_dirs("demo")
    dense = open_pair(target, drafter, "dense")
    made = make_clusters(drafter, dense, texts=documentation(dense, documents))
    texts, drafted, accepted = {}, {}, {}
    for name, pair in (("dense", dense), ("kmeans", dense.with_clusters(made.table, made.top_k, "kmeans"))):
        export_bundle(pair, tmp_path / name, ExportOptions("onnx", RECIPES["fp32"], max_seq_len=MAX_SEQ_LEN))
        engine = open_engine(tmp_path / name, threads=1)
        tokenizer = TextTokenizer(tmp_path / name, engine.manifest)
        runs = [
            (list(generate(engine, tokenizer.encode(topics[topic])[:12], Options(96, 4), stats)), stats)
            for topic, stats in ((topic, Stats()) for topic in sorted(topics)[:8])
        ]
        texts[name] = [tokens for tokens, _ in runs]
        drafted[name] = sum(stats.drafted for _, stats in runs)
        accepted[name] = sum(stats.accepted for _, stats in runs)
    assert texts["kmeans"] == texts["dense"]
    assert drafted["dense"] > 500
    assert abs(accepted["kmeans"] / drafted["kmeans"] - accepted["dense"] / drafted["dense"]) < 0.02
    assert made.measurements()["curve"][-1]["tokens_scored"] == 2048
    scored = next(row for row in made.measurements()["curve"] if row["top_k_clusters"] == made.top_k)
    assert scored["share_of_dense_head"] < 0.25


def test_parity_of_a_bundle_with_clusters_of_its_own(bundle: Callable[..., Path], pair_dirs: Pairs) -> None:
    """The clusters do not divide the vocabulary. The bundle holds their table, because no checkpoint does."""
    path = bundle("kmeans")
    pair = open_source(path, *pair_dirs("dense"))
    assert pair.two_stage is not None
    assert (pair.two_stage.num_clusters, pair.two_stage.cluster_size) == (48, 6)
    checks = run_parity(path, pair, [[5], list(range(3, 40))], 12)
    assert [check for check in checks if not check.passed] == []
    assert any("with a dense head" in check.detail for check in checks)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["two_stage"]["origin"] == "kmeans"
    assert "clusters.safetensors" in manifest["files"]


PROMPTS = {
    "too short": ([[1, 2, 3]], r"drafting gives 12 different states .* expected 1024 or more; give longer prompts"),
    "one prompt many times": ([[1, 2, 3]] * 90, r"drafting gives 12 different states"),
    "beyond the vocabulary": ([[1, 256]], r"prompt 0 has token 256, expected ids from 0 to 255"),
    "negative": ([[1], [2, -1]], r"prompt 1 has token -1, expected ids from 0 to 255"),
    "no number that fits": ([[2**70]], r"prompt 0 has token 1180591620717411303424"),
    "beyond the context": ([[1] * 200_000], r"prompt 0 has 200000 tokens, the target has 131072 positions"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_nothing_can_be_judged_by(name: str, pair_dirs: Pairs) -> None:
    prompts, message = PROMPTS[name]
    target, drafter = pair_dirs("dense")
    with pytest.raises(InputError, match=message):
        make_clusters(drafter, open_pair(target, drafter), texts=TokenTexts(tuple(map(tuple, prompts)), "the prompts"))


@pytest.mark.parametrize(
    ("row", "message"),
    [(float("nan"), r"model.embed_tokens.weight holds NaN"), (1e30, r"embedding of token 7 is too large to square")],
)
def test_rows_that_cannot_be_clustered(row: float, message: str, pair_dirs: Pairs, tmp_path: Path) -> None:
    drafter = Path(shutil.copytree(pair_dirs("dense")[1], tmp_path / "drafter"))
    tensors = load_file(drafter / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = row
    save_file(tensors, drafter / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        make_clusters(drafter, None)


def test_a_drafter_whose_states_are_all_zero(pair_dirs: Pairs, tmp_path: Path) -> None:
    drafter = Path(shutil.copytree(pair_dirs("dense")[1], tmp_path / "drafter"))
    tensors = load_file(drafter / "model.safetensors")
    tensors["model.norm.weight"][:] = 0
    save_file(tensors, drafter / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"drafting gives 1 different states"):
        make_clusters(drafter, None)


def test_a_drafter_that_has_its_embedding_as_its_head_alone(pair_dirs: Pairs, tmp_path: Path, run: Run) -> None:
    """The clusters are those of the same drafter as published."""
    target, drafter = pair_dirs("dense")
    renamed = shutil.copytree(drafter, tmp_path / "drafter")
    edit_tensors(renamed, lambda x: x.update({"lm_head.weight": x.pop("model.embed_tokens.weight")}))
    for name, directory in (("a", drafter), ("b", renamed)):
        assert run("cluster", "--drafter", directory, "--clusters", 8, "--output", tmp_path / name)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    options = [
        "--recipe",
        "fp32",
        "--head",
        "kmeans",
        "--cluster-table",
        tmp_path / "a",
        "--output",
        tmp_path / "bundle",
    ]
    assert run("export", "--target", target, "--drafter", renamed, *options)[0] == 0
