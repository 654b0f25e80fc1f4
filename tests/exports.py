"""The export of a test bundle."""

from pathlib import Path

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.heads.clusters import ClusterOptions, make_clusters
from tests.pairs import SHAPES

# Shapes and backends of the fp32 bundles that random pairs are tested with. ExecuTorch's take minutes to lower: `odd`
# has two-stage logits, several KV heads and no size that is a power of two; `dense` has a dense head and a softcap.
SMALL_BUNDLES = [*((name, "onnx") for name in SHAPES), ("odd", "executorch"), ("dense", "executorch")]
# Shapes of the bundles in few bits, by backend and recipe; others are `e2b`.
LOW_BIT_SHAPES = {("executorch", "int8"): "tiny", ("executorch", "smallest"): "tiny"}
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
        recipe: name of the recipe.
        clusters: number of new clusters to make; None for the checkpoint's, or a dense head.
    """
    pair = open_pair(target, drafter)
    if clusters is not None:
        clustering = make_clusters(drafter, pair, ClusterOptions(clusters))
        pair = pair.with_clusters(clustering.table, clustering.top_k, "kmeans")
    export_bundle(pair, output, ExportOptions(backend, recipe, max_seq_len=MAX_SEQ_LEN))
    return output
