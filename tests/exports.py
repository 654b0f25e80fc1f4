"""The export of a test bundle."""

from pathlib import Path

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.heads.clusters import ClusterOptions, make_clusters
from exporter.quantization.recipes import RECIPES, Recipe, Rule
from exporter.quantization.widths import FLOAT, Width
from tests.pairs import SHAPES

# Shapes and backends of the fp32 bundles that random pairs are tested with. ExecuTorch's take minutes to lower: `odd`
# has two-stage logits, several KV heads and no size that is a power of two; `dense` has a dense head and a softcap.
SMALL_BUNDLES = [*((name, "onnx") for name in SHAPES), ("odd", "executorch"), ("dense", "executorch")]
# Shapes of the bundles in few bits, by backend and recipe; others are `e2b`.
LOW_BIT_SHAPES = {("executorch", name): "tiny" for name in ("int8", "mixed")}
# A recipe of one's own: every width that named ones lack, beside others.
MIXED = Recipe(
    "mixed",
    (
        Rule("target.embed_tokens_per_layer.weight", Width(2)),
        Rule("target.*.o_proj.weight", FLOAT),
        Rule("target.*.down_proj.weight", Width(8)),
        Rule("target.*.mlp.*", Width(4, 32)),
        Rule("target.*.q_proj.weight", Width(4, 64)),
        Rule("target.*.per_layer_input_gate.weight", Width(2)),
        Rule("drafter.*", Width(4)),
        Rule("*", Width(8)),
    ),
)
MAX_SEQ_LEN = 600  # in that many tokens the buffers of sliding layers move twice


def export(
    output: Path, target: Path, drafter: Path, backend: str, recipe: str = "fp32", clusters: int | None = None
) -> Path:
    """Write a bundle with a context of `MAX_SEQ_LEN` tokens, and return its directory.

    Args:
        output: bundle directory to write.
        target: the target's checkpoint directory.
        drafter: the drafter's checkpoint directory.
        backend: name of the backend.
        recipe: name of the recipe, or `mixed`.
        clusters: number of new clusters to make; None for the checkpoint's, or a dense head.
    """
    pair = open_pair(target, drafter)
    if clusters is not None:
        clustering = make_clusters(drafter, pair, ClusterOptions(clusters))
        pair = pair.with_clusters(clustering.table, clustering.top_k, "kmeans")
    export_bundle(pair, output, ExportOptions(backend, {**RECIPES, "mixed": MIXED}[recipe], max_seq_len=MAX_SEQ_LEN))
    return output
