"""Methods of choosing the number of drafts, compared on texts: `python -m exporter.studies.draft_planning`.

Decoding is simulated (see `exporter.studies.simulation`), so the result does not depend on the machine. The project's
own method is compared with the best fixed number of drafts in hindsight, and with two rules from elsewhere.
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
    MAX_DRAFT_TOKENS,
    TRACES_FILE,
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

NUM_SEEDS = 3
NEW_TOKENS = 96
MAX_RECORDED_TEXTS = 24  # of each type


def compare(texts: Texts, table: CostTable) -> dict[str, float]:
    """Simulate decoding with each method.

    Args:
        texts: the texts.
        table: costs of passes and draft steps.

    Returns:
        Speed-up over plain decoding by method, that of the best fixed number of drafts, and that number.
    """
    methods = {
        "auto": planned(table),
        "auto, costs unknown": planned(table, costs_known=False),
        "auto, no look-ups": planned(table, prompt_lookup=False),
        "transformers' +2/-1": transformers_heuristic,
        "rule of thumb, from 6": rule_of_thumb(6),
    }
    times = {name: simulate(texts, table, choose) for name, choose in methods.items()}
    rates = {name: tokens / time for name, (time, tokens) in times.items()}
    numbers = range(MAX_DRAFT_TOKENS + 1)
    by_drafts = [tokens / time for time, tokens in (simulate(texts, table, fixed(k)) for k in numbers)]
    best = max(numbers, key=by_drafts.__getitem__)
    return {**rates, "best fixed": by_drafts[best], "best number": best}


def record(bundle: Path) -> dict[str, list[dict[str, object]]]:
    """Record texts of the built-in pair: greedy and sampled continuations of held-out texts, and copied passages.

    Args:
        bundle: a bundle of the built-in pair.

    Returns:
        The content of `TRACES_FILE`: for each type of text, the fields of its `Trace`s.
    """
    decoder = open_decoder(bundle, threads=1)
    assert decoder.tokenizer is not None
    engine = decoder.engine
    assert isinstance(engine, GraphEngine)
    _, held_out = documents()
    encoded = [decoder.tokenizer.encode(text) for text in held_out]
    traces: dict[str, list[dict[str, object]]] = {"greedy": [], "sampled": [], "copied passages": []}
    for number, text in enumerate(encoded[:MAX_RECORDED_TEXTS]):
        prompt = text[:12]
        for name, sampling in (("greedy", Sampling()), ("sampled", Sampling(1.0, 0.95, seed=number))):
            answer = list(generate(engine, prompt, Options(NEW_TOKENS, 4, sampling), Stats()))
            traces[name].append(_trace(engine, [*prompt, *answer], len(prompt)))
    for passage in [text for text in encoded if len(text) >= 40][:MAX_RECORDED_TEXTS]:
        traces["copied passages"].append(_trace(engine, [*passage[:80], *passage[1:80]], len(passage[:80])))
    return traces


def _trace(engine: GraphEngine, tokens: list[int], prompt: int) -> dict[str, object]:
    """Draft after each token of a given text, and count how many drafts the text confirms."""
    engine.prefill(tokens[:prompt], Sampling())
    accepted = [0] * prompt
    for last in range(prompt, len(tokens)):
        drafts = engine.draft(tokens[last], MAX_DRAFT_TOKENS)
        accepted.append(common_prefix(drafts, tokens[last + 1 :]))
        engine.verify(tokens[last], [], Sampling())
    return {"tokens": tokens, "accepted": accepted, "prompt": prompt}


def measure() -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Compare the methods on all texts at all costs.

    Yields:
        Name of the costs, category and name of the texts, and the result of `compare`, for synthetic texts its mean
        over the seeds.
    """
    drawn = [synthetic_texts(seed) for seed in range(NUM_SEEDS)]
    groups = [*zip(*drawn, strict=True), *((texts,) for texts in recorded_texts())]
    for costs, table in COSTS.items():
        for group in groups:
            rows = [compare(texts, table) for texts in group]
            means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            yield costs, group[0].category, group[0].name, means


@click.command()
@click.option("--record", "bundle", type=click.Path(path_type=Path), help="Record texts with a bundle of the pair.")
@click.option("--json", "as_json", is_flag=True)
def main(bundle: Path | None, as_json: bool) -> None:
    """Compare methods of choosing the number of drafts."""
    if bundle is not None:
        TRACES_FILE.write_text(json.dumps(record(bundle), separators=(",", ":")) + "\n")
        return
    rows = list(measure())
    if as_json:
        click.echo(json.dumps([{"costs": c, "kind": k, "text": n, **row} for c, k, n, row in rows]))
        return
    names = [name for name in rows[0][3] if name != "best number"]
    headings = [name.replace("look-ups", "prompt lookup") for name in names]
    table = Table("costs", "text", *headings, "best K", title="Times as fast as plain decoding")
    for costs, category, name, row in rows:
        cells = [f"{row[column]:.2f}" for column in names]
        table.add_row(costs, f"{category}: {name}", *cells, f"{row['best number']:.1f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
