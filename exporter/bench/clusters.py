"""Equal clusters against scikit-learn's own k-means at full size: `python -m exporter.bench.clusters`.

Each runs in a process of its own, so that its memory is its own. The rows have structure (thousands of centers, norms
that vary, six thousand copies of one row), the states are rows with as much noise. Recall is at the first stage that
keeps `--top-k-clusters`; unequal clusters cannot be laid out as a table, so theirs is a comparison of quality alone.
"""

import json
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans

from clustering.kmeans import equal_clusters
from clustering.recall import best_logits, cluster_ranks, fit_centroids
from exporter.bench import machine

STATES = 4096


def embedding(vocab_size: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [V, E], and states [2 * STATES, E] near some of them."""
    generator = np.random.default_rng(0)
    centers = 0.5 * generator.standard_normal((vocab_size // 64, hidden), np.float32)
    rows = generator.standard_normal((vocab_size, hidden), np.float32)
    for start in range(0, vocab_size, 4096):
        block = rows[start : start + 4096]
        block += centers[generator.integers(0, len(centers), len(block))]
        block *= np.exp(0.2 * generator.standard_normal((len(block), 1), np.float32))
    copies = vocab_size // 43
    rows[vocab_size // 2 : vocab_size // 2 + copies] = rows[0]
    near = rows[generator.integers(0, vocab_size, 2 * STATES)]
    return rows, near + generator.standard_normal(near.shape, np.float32)


def equal(rows: np.ndarray, clusters: int) -> list[np.ndarray]:
    return np.array_split(equal_clusters(rows, clusters), clusters)


def scikit_learn(rows: np.ndarray, clusters: int) -> list[np.ndarray]:
    labels = KMeans(clusters, n_init=1, max_iter=20, random_state=0).fit(rows).labels_
    return np.split(np.argsort(labels, kind="stable"), np.bincount(labels, minlength=clusters).cumsum()[:-1])


METHODS: dict[str, Callable[[np.ndarray, int], list[np.ndarray]]] = {
    "equal clusters": equal,
    "scikit-learn's KMeans, 20 iterations": scikit_learn,
}


def measure(method: str, vocab_size: int, hidden: int, clusters: int, top_k: int) -> dict[str, Any]:
    """Time, memory and quality of one method."""
    rows, states = embedding(vocab_size, hidden)
    started = time.perf_counter()
    parts = METHODS[method](rows, clusters)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    means = np.stack([rows[part].mean(0) for part in parts])
    best = np.concatenate([best_logits(states, rows, part[None]) for part in parts], axis=1)
    fitted = fit_centroids(states[:STATES], best[:STATES], means)
    facts: dict[str, Any] = {"method": method, "seconds": seconds, "peak_bytes": peak}
    facts["largest_cluster"] = max(map(len, parts))
    for name, centroids in (("means", means), ("fitted", fitted)):
        ranks = cluster_ranks(states[STATES:], best[STATES:], centroids)
        facts[f"recall_of_{name}"] = float((ranks < top_k).mean())
    return facts


@click.command()
@click.option("--vocab-size", default=262144, show_default=True)
@click.option("--hidden", default=256, show_default=True)
@click.option("--clusters", default=2048, show_default=True)
@click.option("--top-k-clusters", default=32, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(vocab_size: int, hidden: int, clusters: int, top_k_clusters: int, as_json: bool) -> None:
    """Run both and print seconds, memory and recall."""
    found = []
    for method in METHODS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found.append(pool.submit(measure, method, vocab_size, hidden, clusters, top_k_clusters).result())
    if as_json:
        click.echo(json.dumps({"machine": machine(), "vocab_size": vocab_size, "hidden": hidden, "methods": found}))
        return
    table = Table(title=f"{vocab_size} x {hidden} into {clusters} clusters, {top_k_clusters} kept\n{machine()}")
    for heading in ("method", "seconds", "peak GB", "largest cluster", "recall, means", "recall, fitted centroids"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in found:
        figures = f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}", str(row["largest_cluster"])
        table.add_row(row["method"], *figures, f"{row['recall_of_means']:.1%}", f"{row['recall_of_fitted']:.1%}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
