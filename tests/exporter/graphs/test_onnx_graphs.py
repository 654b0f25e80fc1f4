"""The exported graphs: a sparse drafter head, weights in files of their own, no trace of the exporting machine."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from exporter.checkpoint.pair import open_pair
from exporter.graphs.onnx import stored_weights
from exporter.modeling.config import TextConfig
from tests.pairs import SHAPES


def test_kv_shared_layers_run_on_the_output_rows_alone(bundle: Callable[[str], Path]) -> None:
    model = ir.load(bundle("e2b") / "target.onnx")
    rows = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name is not None and value.name.endswith("self_attn.q_proj.weight"):
                rows[int(value.name.split(".")[1])] = str(node.inputs[0].shape[0])
    storing = len(SHAPES["e2b"].layer_types) - SHAPES["e2b"].shared
    assert rows == {i: "num_tokens" if i < storing else "num_outputs" for i in range(len(rows))}


@pytest.mark.parametrize("name", ["odd", "kmeans"])
def test_drafter_head_stays_sparse(name: str, bundle: Callable[[str], Path]) -> None:
    """No tensor of the drafter has V as a dimension; the embeddings of a cluster are one row of the head's weight."""
    manifest = json.loads((bundle(name) / "manifest.json").read_text())
    vocab_size, sizes = manifest["target"]["vocab_size"], manifest["two_stage"]
    model = ir.load(bundle(name) / "drafter.onnx")
    ShapeInferencePass()(model)
    values = [value for node in model.graph for value in node.outputs] + list(model.graph.initializers.values())
    assert [value.name for value in values if value.shape is None] == []
    assert [value.name for value in values if vocab_size in value.shape.dims] == []
    clusters = model.graph.initializers["head.clusters"]
    width = manifest["drafter"]["text"]["hidden_size"]
    assert list(clusters.shape or []) == [sizes["num_clusters"], sizes["cluster_size"] * width]


@pytest.mark.parametrize("name", ["target", "drafter"])
def test_graph_files_hold_structure_only(name: str, bundle: Callable[[str], Path]) -> None:
    content = (bundle("e2b") / f"{name}.onnx").read_bytes()
    assert len(content) < 200_000
    for trace in (b"/modeling/", b"site-packages", str(Path.home()).encode(), b".py"):
        assert trace not in content


def test_kv_sources() -> None:
    """E2B's drafter reads the K and V of layers 13 and 14, E4B's of 22 and 23."""
    for shared, layers, per_group, sources in ((20, 35, 4, (13, 14)), (18, 42, 5, (22, 23))):
        pattern = (("sliding_attention",) * per_group + ("full_attention",)) * 7
        config = TextConfig(
            **{**empty_config(), "layer_types": pattern, "num_hidden_layers": layers, "num_kv_shared_layers": shared}
        )
        assert (config.kv_source("sliding_attention"), config.kv_source("full_attention")) == sources


def empty_config() -> dict:
    return dict.fromkeys(TextConfig.__dataclass_fields__)


def test_eager_and_bundle_share_one_definition(
    bundle: Callable[[str], Path], pair_dirs: Callable[[str], tuple[Path, Path]]
) -> None:
    """Stored weights have the names of the eager module's parameters: model and graph have one definition."""
    pair = open_pair(*pair_dirs("e2b"))
    stored = {name: stored_weights(bundle("e2b") / f"{name}.onnx").keys() for name in ("target", "drafter")}
    assert stored["target"] == pair.target_weights.keys() - {"embed_tokens_per_layer.weight"}
    assert stored["drafter"] == pair.drafter_weights.keys() - {"target_embed_tokens.weight"}
