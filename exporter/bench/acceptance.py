"""What clusters cost in accepted drafts, on the built-in pair: `python -m exporter.bench.acceptance`.

The first tokens of its held-out texts are continued greedily with four drafts a round, by bundles that differ in the
drafter's head alone: dense, the checkpoint's clusters, and new ones at the default recall.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from exporter.bundle import ExportOptions, export_bundle
from exporter.clusters import make_clusters
from exporter.demo import PAIR
from exporter.demo.corpus import documents
from exporter.pair import Pair, open_pair
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer


def clustered(pair: Pair) -> Pair:
    """The pair with new clusters, as `export --head kmeans` makes them."""
    made = make_clusters(pair.drafter_checkpoint.directory, pair)
    return pair.with_clusters(made.table, made.top_k, "kmeans")


HEADS: dict[str, Callable[[Pair], Pair]] = {
    "dense": lambda pair: pair,
    "the checkpoint's clusters": lambda pair: open_pair(PAIR / "target", PAIR / "drafter", "checkpoint"),
    "new clusters": clustered,
}


def measure(pair: Pair, texts: list[str], new_tokens: int) -> dict[str, float]:
    """Acceptance, and passes of the target, over the continuations of texts."""
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "bundle"
        export_bundle(pair, bundle, ExportOptions(max_seq_len=256))
        engine = open_engine(bundle, threads=1)
        tokenizer = TextTokenizer(bundle, engine.manifest)
        drafted = accepted = rounds = 0
        for text in texts:
            stats = Stats()
            for _ in generate(engine, tokenizer.encode(text)[:12], Options(new_tokens, 4), stats):
                pass
            drafted, accepted, rounds = drafted + stats.drafted, accepted + stats.accepted, rounds + stats.rounds
    return {"acceptance_rate": accepted / drafted, "drafted": drafted, "verify_passes": rounds}


@click.command()
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(new_tokens: int, as_json: bool) -> None:
    """Count accepted drafts for each head."""
    _, held_out = documents()
    dense = open_pair(PAIR / "target", PAIR / "drafter", "dense")
    found = {name: measure(head(dense), held_out, new_tokens) for name, head in HEADS.items()}
    if as_json:
        click.echo(json.dumps({"texts": len(held_out), "heads": found}))
        return
    table = Table(title=f"The built-in pair, {len(held_out)} held-out texts, 4 drafts a round")
    for heading in ("head of the drafter", "drafts accepted", "verify passes", "against dense"):
        table.add_column(heading, justify="left" if heading.startswith("head") else "right")
    for name, row in found.items():
        share = row["verify_passes"] / found["dense"]["verify_passes"]
        table.add_row(name, f"{row['acceptance_rate']:.1%}", f"{row['verify_passes']:.0f}", f"{share - 1:+.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
