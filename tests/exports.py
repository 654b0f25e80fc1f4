"""The export of a test bundle, as a function that other processes can import."""

from pathlib import Path

import threadpoolctl
import torch

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.heads.clusters import ClusterOptions, make_clusters

MAX_SEQ_LEN = 600  # in that many tokens the buffers of sliding layers move twice


def export(
    target: Path, drafter: Path, output: Path, backend: str, recipe: str = "fp32", clusters: int | None = None
) -> Path:
    """Write a bundle with a context of `MAX_SEQ_LEN` tokens, and return its directory.

    Args:
        target: the target's checkpoint directory.
        drafter: the drafter's checkpoint directory.
        output: bundle directory to write.
        backend: name of the backend.
        recipe: name of the recipe.
        clusters: number of new clusters to make; None for the checkpoint's, or a dense head.
    """
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    pair = open_pair(target, drafter)
    if clusters is not None:
        clustering = make_clusters(drafter, pair, ClusterOptions(clusters))
        pair = pair.with_clusters(clustering.table, clustering.top_k, "kmeans")
    export_bundle(pair, output, ExportOptions(backend, recipe, max_seq_len=MAX_SEQ_LEN))
    return output
