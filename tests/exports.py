"""Exports that run in a process of their own."""

from pathlib import Path

import threadpoolctl
import torch

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.heads.clusters import ClusterOptions, make_clusters

MAX_SEQ_LEN = 600  # sliding layers' buffers move twice in that many


def export(
    target: Path, drafter: Path, output: Path, backend: str, recipe: str = "fp32", clusters: int | None = None
) -> Path:
    """Write a bundle with the context that the tests expect, and return where it is; `clusters` asks for new ones."""
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    pair = open_pair(target, drafter)
    if clusters is not None:
        made = make_clusters(drafter, pair, ClusterOptions(clusters))
        pair = pair.with_clusters(made.table, made.top_k, "kmeans")
    export_bundle(pair, output, ExportOptions(backend, recipe, max_seq_len=MAX_SEQ_LEN))
    return output
