"""Clusters of equal size compared with scikit-learn's k-means: `python -m exporter.studies.kmeans_comparison`.

Two sets of data: generated rows of full size (thousands of dense groups, norms that vary, six thousand copies of one
row) with states near some of the rows; and the rows of the built-in pair, which are trained, with the states of its
drafting. Each run has a process of its own, so that its peak memory is its own. Clusters of unequal size cannot be
stored as a table; they are here only to compare quality.
"""

import functools
import json
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
from exporter.bench.timing import machine
from exporter.checkpoint.pair import open_pair
from exporter.demo import PAIR
from exporter.heads.states import drafting_states
from exporter.terminal import peak_bytes
from exporter.texts.token_texts import fitting_texts


def generated(vocab_size: int = 262144, hidden: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Generate rows, and states near some of them.

    Args:
        vocab_size: number of rows, V.
        hidden: length of a row, E.

    Returns:
        Rows [V, E] and states [8192, E], float32.
    """
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((vocab_size // 64, hidden), np.float32)
    rows = generator.standard_normal((vocab_size, hidden), np.float32)
    for start in range(0, vocab_size, 4096):
        block = rows[start : start + 4096]
        block += centers[generator.integers(0, len(centers), len(block))]
        block *= np.exp(0.2 * generator.standard_normal((len(block), 1), np.float32))
    copies = vocab_size // 43
    rows[vocab_size // 2 : vocab_size // 2 + copies] = rows[0]
    near = rows[generator.integers(0, vocab_size, 8192)]
    return rows, near + generator.standard_normal(near.shape, np.float32)


def built_in() -> tuple[np.ndarray, np.ndarray]:
    """Return the built-in drafter's embedding rows [V, E], and its states [states, E] while it drafts; float32.

    The states are those of drafting on the texts that clusters are fitted on, in their order.
    """
    pair = open_pair(PAIR / "target", PAIR / "drafter", "dense")
    states = drafting_states(pair, fitting_texts(pair).texts, lambda: None)
    return pair.drafter_weights["head.weight"]().numpy(), states.numpy()


def equal(rows: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Cluster rows with this project's `equal_clusters`.

    Args:
        rows: [V, E] float32.
        clusters: number of clusters, at most V.

    Returns:
        Ids of the rows in each cluster.
    """
    return np.array_split(equal_clusters(rows, clusters), clusters)


def scikit_learn(rows: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Cluster rows with scikit-learn's `KMeans`.

    It starts from random rows: choosing better ones takes ten times as long as all the rest at full size.

    Args:
        rows: [V, E] float32.
        clusters: number of clusters.

    Returns:
        Ids of the rows in each cluster.
    """
    labels = KMeans(clusters, init="random", n_init=1, max_iter=20, random_state=0).fit(rows).labels_
    return np.split(np.argsort(labels, kind="stable"), np.bincount(labels, minlength=clusters).cumsum()[:-1])


METHODS: dict[str, Callable[[np.ndarray, int], list[np.ndarray]]] = {
    "equal clusters": equal,
    "scikit-learn's KMeans": scikit_learn,
}
# Name -> function that returns rows and states, number of clusters, number of clusters kept.
DATA: dict[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], int, int]] = {
    "generated, 262144 x 256": (generated, 2048, 32),
    "generated, 262144 x 1024": (functools.partial(generated, hidden=1024), 2048, 32),
    "built-in pair, 2048 x 128": (built_in, 64, 8),
}
DEFAULT_DATA = ("generated, 262144 x 256", "built-in pair, 2048 x 128")  # the other one takes ten minutes


def measure(data: str, method: str) -> dict[str, Any]:
    """Measure time, memory and quality of one method.

    Centroids are fitted on the first half of the states; recall is measured on the second half.

    Args:
        data: a key of `DATA`.
        method: a key of `METHODS`.

    Returns:
        An entry of `runs` in the `--json` document: `seconds`, `peak_bytes`, `largest_cluster` in rows, and as recall
        the ratio of states whose best token is in the clusters kept, by `means` and by `fitted` centroids.
    """
    load, clusters, top_k = DATA[data]
    rows, states = load()
    started = time.perf_counter()
    parts = METHODS[method](rows, clusters)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    means = np.stack([rows[part].mean(0) for part in parts])
    best = np.concatenate([best_logits(states, rows, part[None]) for part in parts], axis=1)
    half = len(states) // 2
    fitted = fit_centroids(states[:half], best[:half], means)
    measurements = {
        "rows": data,
        "method": method,
        "clusters": clusters,
        "top_k_clusters": top_k,
        "seconds": seconds,
        "peak_bytes": peak,
        "largest_cluster": max(map(len, parts)),
    }
    for name, centroids in (("means", means), ("fitted", fitted)):
        ranks = cluster_ranks(states[half:], best[half:], centroids)
        measurements[f"recall_of_{name}"] = float((ranks < top_k).mean())
    return measurements


@click.command()
@click.option("--data", type=click.Choice(list(DATA)), multiple=True, default=DEFAULT_DATA, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(data: tuple[str, ...], as_json: bool) -> None:
    """Run both methods and print seconds, memory and recall."""
    runs = []
    for name in data:
        for method in METHODS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                runs.append(pool.submit(measure, name, method).result())
    if as_json:
        click.echo(json.dumps({"machine": machine(), "runs": runs}))
        return
    table = Table("rows", "method", title=f"Clusters of the vocabulary\n{machine()}")
    for heading in ("clusters, kept", "seconds", "peak GB", "largest cluster", "recall, means", "recall, fitted"):
        table.add_column(heading, justify="right")
    for row in runs:
        kept = f"{row['clusters']}, {row['top_k_clusters']}"
        figures = f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}", str(row["largest_cluster"])
        recalls = f"{row['recall_of_means']:.1%}", f"{row['recall_of_fitted']:.1%}"
        table.add_row(row["rows"], row["method"], kept, *figures, *recalls)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
