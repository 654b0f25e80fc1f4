"""What choosing the number of drafts is worth, on texts with known acceptance: `python -m exporter.bench.draft_length`.

Simulated, so nothing here depends on the machine; `exporter.bench.simulation` says how. Beside the product's own way
stand the best fixed number of drafts in hindsight, and two rules that others use.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from exporter.demo.corpus import documents
from exporter.studies.simulation import (
    COSTS,
    MOST,
    RECORDED,
    CostTable,
    Texts,
    fixed,
    planned,
    recorded_texts,
    rule_of_thumb,
    simulate,
    synthetic_texts,
    transformers_heuristic,
)
from runtime_ref.acceptance import common_prefix
from runtime_ref.decoder import Options, generate
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.streaming import open_decoder

SEEDS = 3
NEW_TOKENS = 96
TEXTS = 24  # of each kind are recorded


def compare(texts: Texts, table: CostTable) -> dict[str, float]:
    """Tokens in the time of a plain pass, by way to choose."""
    ways = {
        "auto": planned(table),
        "auto, costs unknown": planned(table, known=False),
        "auto, no look-ups": planned(table, lookups=False),
        "transformers' +2/-1": transformers_heuristic,
        "rule of thumb, from 6": rule_of_thumb(6),
    }
    times = {name: simulate(texts, table, choose) for name, choose in ways.items()}
    rates = {name: tokens / time for name, (time, tokens) in times.items()}
    by_drafts = [tokens / time for time, tokens in (simulate(texts, table, fixed(k)) for k in range(MOST + 1))]
    best = max(range(MOST + 1), key=by_drafts.__getitem__)
    return {**rates, "best fixed": by_drafts[best], "best number": best}


def record(bundle: Path) -> dict[str, list[dict[str, object]]]:
    """Texts of the built-in pair, and how many drafts after each token would be accepted."""
    decoder = open_decoder(bundle, threads=1)
    assert decoder.tokenizer is not None
    engine = decoder.engine
    assert isinstance(engine, GraphEngine)
    _, held_out = documents()
    starts = [decoder.tokenizer.encode(text) for text in held_out]
    found: dict[str, list[dict[str, object]]] = {"greedy": [], "sampled": [], "copied passages": []}
    for number, text in enumerate(starts[:TEXTS]):
        prompt = text[:12]
        for kind, sampling in (("greedy", Sampling()), ("sampled", Sampling(1.0, 0.95, seed=number))):
            answer = list(generate(engine, prompt, Options(NEW_TOKENS, 4, sampling), Stats()))
            found[kind].append(_judged(engine, [*prompt, *answer], len(prompt)))
    for passage in [text for text in starts if len(text) >= 40][:TEXTS]:
        found["copied passages"].append(_judged(engine, [*passage[:80], *passage[1:80]], len(passage[:80])))
    return found


def _judged(engine: GraphEngine, tokens: list[int], prompt: int) -> dict[str, object]:
    """Drafts after each token of a text that is given."""
    engine.prefill(tokens[:prompt], Sampling())
    accepted = [0] * prompt
    for last in range(prompt, len(tokens)):
        drafts = engine.draft(tokens[last], MOST)
        accepted.append(common_prefix(drafts, tokens[last + 1 :]))
        engine.position = last
        engine.verify(tokens[last], [], Sampling())
    return {"tokens": tokens, "accepted": accepted, "prompt": prompt}


def measure() -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Cost table, kind and name of texts, and what each way makes of them; the mean over seeds of synthetic ones."""
    drawn = [synthetic_texts(seed) for seed in range(SEEDS)]
    groups = [*zip(*drawn, strict=True), *((texts,) for texts in recorded_texts())]
    for costs, table in COSTS.items():
        for group in groups:
            rows = [compare(texts, table) for texts in group]
            yield costs, group[0].kind, group[0].name, {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}


@click.command()
@click.option("--record", "bundle", type=click.Path(path_type=Path), help="Record texts with a bundle of the pair.")
@click.option("--json", "as_json", is_flag=True)
def main(bundle: Path | None, as_json: bool) -> None:
    """Compare ways to choose the number of drafts."""
    if bundle is not None:
        RECORDED.write_text(json.dumps(record(bundle), separators=(",", ":")) + "\n")
        return
    found = list(measure())
    if as_json:
        click.echo(json.dumps([{"costs": c, "kind": k, "text": n, **row} for c, k, n, row in found]))
        return
    names = [name for name in found[0][3] if name != "best number"]
    table = Table("costs", "text", *names, "best K", title="Times as fast as plain decoding")
    for costs, kind, name, row in found:
        cells = [f"{row[column]:.2f}" for column in names]
        table.add_row(costs, f"{kind}: {name}", *cells, f"{row['best number']:.1f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
