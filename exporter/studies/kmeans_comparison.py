"""Equal clusters against scikit-learn's own k-means: `python -m exporter.bench.clusters`.

Once at full size, on generated rows (thousands of heaps, norms that vary, six thousand copies of one row) and states
near some of them; once on the built-in pair's rows and states of its drafting, which are trained. Each run has a
process of its own, so that its memory is its own. Unequal clusters cannot be laid out as a table: they are there to
compare quality.
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
from exporter.heads.states import drafting_states, random_prompts
from exporter.terminal import peak_bytes


def generated(vocab_size: int = 262144, hidden: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Rows [V, E], and states [8192, E] near some of them."""
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
    """The drafter's rows, and its states while it drafts on random prompts, in their order."""
    pair = open_pair(PAIR / "target", PAIR / "drafter", "dense")
    states = drafting_states(pair, random_prompts(pair.target), lambda: None)
    return pair.drafter_weights["head.weight"]().numpy(), states.numpy()


def equal(rows: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Ours."""
    return np.array_split(equal_clusters(rows, clusters), clusters)


def scikit_learn(rows: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Its k-means, from random rows on: choosing better ones takes ten times as long as all the rest at full size."""
    labels = KMeans(clusters, init="random", n_init=1, max_iter=20, random_state=0).fit(rows).labels_
    return np.split(np.argsort(labels, kind="stable"), np.bincount(labels, minlength=clusters).cumsum()[:-1])


METHODS: dict[str, Callable[[np.ndarray, int], list[np.ndarray]]] = {
    "equal clusters": equal,
    "scikit-learn's KMeans": scikit_learn,
}
# Rows and states, clusters, and how many of them are kept.
DATA: dict[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], int, int]] = {
    "generated, 262144 x 256": (generated, 2048, 32),
    "generated, 262144 x 1024": (functools.partial(generated, hidden=1024), 2048, 32),
    "built-in pair, 2048 x 128": (built_in, 64, 8),
}
STANDING = ("generated, 262144 x 256", "built-in pair, 2048 x 128")  # the other one takes ten minutes


def measure(data: str, method: str) -> dict[str, Any]:
    """Time, memory and quality of one method. The first half of the states fits centroids, the second judges."""
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
    facts = {"rows": data, "method": method, "clusters": clusters, "top_k_clusters": top_k, "seconds": seconds}
    facts |= {"peak_bytes": peak, "largest_cluster": max(map(len, parts))}
    for name, centroids in (("means", means), ("fitted", fitted)):
        ranks = cluster_ranks(states[half:], best[half:], centroids)
        facts[f"recall_of_{name}"] = float((ranks < top_k).mean())
    return facts


@click.command()
@click.option("--data", type=click.Choice(list(DATA)), multiple=True, default=STANDING, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(data: tuple[str, ...], as_json: bool) -> None:
    """Run both methods and print seconds, memory and recall."""
    found = []
    for name in data:
        for method in METHODS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found.append(pool.submit(measure, name, method).result())
    if as_json:
        click.echo(json.dumps({"machine": machine(), "runs": found}))
        return
    table = Table("rows", "method", title=f"Clusters of the vocabulary\n{machine()}")
    for heading in ("clusters, kept", "seconds", "peak GB", "largest", "recall, means", "recall, fitted"):
        table.add_column(heading, justify="right")
    for row in found:
        kept = f"{row['clusters']}, {row['top_k_clusters']}"
        figures = f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}", str(row["largest_cluster"])
        recalls = f"{row['recall_of_means']:.1%}", f"{row['recall_of_fitted']:.1%}"
        table.add_row(row["rows"], row["method"], kept, *figures, *recalls)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
