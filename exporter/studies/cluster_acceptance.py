"""Accepted drafts of the built-in pair by type of head: `python -m exporter.studies.cluster_acceptance`.

The first tokens of the held-out texts are continued greedily, with four drafts per round, by bundles that differ only
in the drafter's head: a dense one, the checkpoint's clusters, and new clusters at the default recall.
"""

import json
from collections.abc import Callable

import click
from rich.console import Console
from rich.table import Table

from exporter.checkpoint.pair import Pair, open_pair
from exporter.demo import PAIR
from exporter.demo.corpus import documents
from exporter.demo.held_out import measure_acceptance
from exporter.heads.clusters import make_clusters


def clustered(pair: Pair) -> Pair:
    """Return the pair with new clusters, as `export --head kmeans` makes them."""
    clustering = make_clusters(pair.drafter_checkpoint.directory, pair)
    return pair.with_clusters(clustering.table, clustering.top_k, "kmeans")


HEADS: dict[str, Callable[[Pair], Pair]] = {
    "dense": lambda pair: pair,
    "the checkpoint's clusters": lambda pair: open_pair(PAIR / "target", PAIR / "drafter", "checkpoint"),
    "new clusters": clustered,
}


@click.command()
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(new_tokens: int, as_json: bool) -> None:
    """Count the accepted drafts for each head."""
    _, held_out = documents()
    dense = open_pair(PAIR / "target", PAIR / "drafter", "dense")
    by_head = {name: measure_acceptance(head(dense), held_out, new_tokens) for name, head in HEADS.items()}
    if as_json:
        click.echo(json.dumps({"texts": len(held_out), "heads": by_head}))
        return
    table = Table(title=f"The built-in pair, {len(held_out)} held-out texts, 4 drafts per round")
    for heading in ("head of the drafter", "drafts accepted", "verify passes", "relative to dense"):
        table.add_column(heading, justify="left" if heading.startswith("head") else "right")
    for name, row in by_head.items():
        ratio = row["verify_passes"] / by_head["dense"]["verify_passes"]
        table.add_row(name, f"{row['acceptance_rate']:.1%}", f"{row['verify_passes']:.0f}", f"{ratio - 1:+.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
