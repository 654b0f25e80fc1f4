"""Run a bundle with runtime_ref on a machine and write its outputs, for compare.py to compare two machines.

    run.py BUNDLE OUTPUT [--prompts N] [--tokens N] [--executorch MODULE]

OUTPUT.json has texts, plain and speculative, greedy and sampled, and whether a row is bitwise the same whatever is
verified with it. OUTPUT.npz has the outputs of rows of a fixed text, each verified alone.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import runtime_ref.engine
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import load_engine
from runtime_ref.graph_engine import GraphEngine, chunks
from runtime_ref.manifest import read_manifest
from runtime_ref.sampling import Sampling
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer

PROMPTS = (
    *("write(self, data)\n", "Return the exception", "Raise an exception if", "Return True if the"),
    *("Convert a string to", "The default value of", "def __init__(self, ", "If the file does not exist,"),
    *("Create a new instance of", "Read at most n bytes", "class Parser:\n", "Wait until the"),
    *("import os\n", "Set the timeout", "This method is called", "Return a list of all"),
    *("Parse the arguments", "for line in file:\n", "Send a message to", "The following functions are"),
)
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_p=0.95, seed=7)}
# Positions where rows are compared: the first one, and across a growth of the cache.
BASE_POSITIONS = (1, 30, 100, 252)
PASS_TOKENS = (2, 3, 5, 9)  # tokens verified together


def main() -> None:
    """Parse the arguments, run the bundle and write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument(
        "--executorch", help="module to run ExecuTorch's methods with instead of runtime_ref.graphs_executorch"
    )
    arguments = parser.parse_args()
    if arguments.executorch:
        runtime_ref.engine.GRAPH_MODULES["executorch"] = arguments.executorch
    started = time.perf_counter()
    manifest = read_manifest(arguments.bundle)
    engine = load_engine(arguments.bundle, manifest, threads=1)
    result = {
        "machine": platform.machine(),
        "backend": manifest.backend,
        "recipe": manifest.recipe,
        "row_multiple": manifest.row_multiple,
        "texts": texts(engine, TextTokenizer(arguments.bundle, manifest), arguments.prompts, arguments.tokens),
    }
    alone, result["rows"] = rows(engine)
    result["seconds"] = round(time.perf_counter() - started, 1)
    np.savez(arguments.output.with_name(f"{arguments.output.name}.npz"), **alone)
    arguments.output.with_name(f"{arguments.output.name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def texts(engine: GraphEngine, tokenizer: TextTokenizer, prompts: int, tokens: int) -> list[dict[str, Any]]:
    """Generate a text after each prompt, greedy and sampled, with and without drafts."""
    generated = []
    for prompt in PROMPTS[:prompts]:
        for way, sampling in SAMPLINGS.items():
            for drafts in (0, engine.manifest.default_draft_tokens):
                stats = Stats()
                text = list(generate(engine, tokenizer.encode(prompt), Options(tokens, drafts, sampling), stats))
                counts = {"rounds": stats.rounds, "drafted": stats.drafted, "accepted": stats.accepted}
                generated.append({"prompt": prompt, "way": way, "drafts": drafts, "tokens": text, **counts})
    return generated


def rows(engine: GraphEngine) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Return the outputs of rows verified alone, and how much those of longer passes differ from them."""
    text = (
        np.random.default_rng(0).integers(3, engine.manifest.vocab_size, BASE_POSITIONS[-1] + PASS_TOKENS[-1]).tolist()
    )
    kept: list[list[np.ndarray]] = []
    passes = [{"tokens": count, "rows": 0, "differ": 0, "state": 0.0} for count in PASS_TOKENS]
    for base in BASE_POSITIONS:
        prefill(engine, text[:base])
        alone = []
        for i in range(PASS_TOKENS[-1]):
            engine.cache.roll_back(base + i)
            alone.append([output[0].copy() for output in engine.extend([text[base + i]], [0])])
        kept += alone
        for seen in passes:
            engine.cache.roll_back(base)
            together = engine.run_target(text[base : base + seen["tokens"]], range(seen["tokens"]))
            for i, one in enumerate(alone[: seen["tokens"]]):
                several = [output[i] for output in together]
                seen["rows"] += 1
                seen["differ"] += any(not np.array_equal(a, b) for a, b in zip(one, several, strict=True))
                seen["state"] = max(seen["state"], distance(one, several)["state"])
    names = ("logits", "ids", "state")
    return {name: np.array(values) for name, values in zip(names, zip(*kept, strict=True), strict=True)}, passes


def distance(one: list[np.ndarray], other: list[np.ndarray]) -> Mapping[str, float]:
    """Return how much the outputs of a row differ.

    Args:
        one: the row's largest logits [k] float32, their ids [k] int64 and its state [E] float32.
        other: those of another computation.

    Returns:
        The largest difference of `logits`, of tokens that both have, and of `state`; `ids_differ` is 1 if the ids do.
    """
    (logits, ids, state), (other_logits, other_ids, other_state) = one, other
    known = dict(zip(other_ids.tolist(), other_logits.tolist(), strict=True))
    differences = [abs(logit - known[i]) for i, logit in zip(ids.tolist(), logits.tolist(), strict=True) if i in known]
    return {
        "logits": max(differences, default=float("inf")),
        "state": float(np.abs(state - other_state).max()),
        "ids_differ": int(not np.array_equal(ids, other_ids)),
    }


def prefill(engine: GraphEngine, tokens: list[int]) -> None:
    """Run a text from position 0 on."""
    engine.cache.roll_back(0)
    for _, chunk in chunks(tokens, engine.manifest.limits["num_tokens"]):
        engine.extend(chunk, [len(chunk) - 1])


if __name__ == "__main__":
    main()
