"""Runs a bundle with runtime_ref and writes what it said: on any machine, so that compare.py can compare two.

    run.py BUNDLE OUTPUT [--prompts N] [--tokens N] [--executorch MODULE]

OUTPUT.json has the texts, plain and speculative, greedy and sampled, and whether a row is the same whatever is verified
with it; OUTPUT.npz has the outputs of rows of fixed texts, each verified alone.
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
from runtime_ref.graph_engine import GraphEngine
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
BASES = (1, 30, 100, 252)  # where rows are compared: the first one, and across a growth of the cache
PASSES = (2, 3, 5, 9)  # tokens verified together


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--executorch", help="module that runs ExecuTorch's methods in place of runtime_ref's")
    arguments = parser.parse_args()
    if arguments.executorch:
        runtime_ref.engine.GRAPH_MODULES["executorch"] = arguments.executorch
    started = time.perf_counter()
    manifest = read_manifest(arguments.bundle)
    engine = load_engine(arguments.bundle, manifest, threads=1)
    found = {
        "machine": platform.machine(),
        "backend": manifest.backend,
        "recipe": manifest.recipe,
        "row_multiple": manifest.row_multiple,
        "texts": texts(engine, TextTokenizer(arguments.bundle, manifest), arguments.prompts, arguments.tokens),
    }
    alone, found["rows"] = rows(engine)
    found["seconds"] = round(time.perf_counter() - started, 1)
    np.savez(arguments.output.with_name(f"{arguments.output.name}.npz"), **alone)
    arguments.output.with_name(f"{arguments.output.name}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def texts(engine: GraphEngine, tokenizer: TextTokenizer, prompts: int, tokens: int) -> list[dict[str, Any]]:
    """What follows each prompt, greedy and sampled, with and without drafts."""
    found = []
    for prompt in PROMPTS[:prompts]:
        for way, sampling in SAMPLINGS.items():
            for drafts in (0, engine.manifest.default_draft_tokens):
                stats = Stats()
                text = list(generate(engine, tokenizer.encode(prompt), Options(tokens, drafts, sampling), stats))
                counts = {"rounds": stats.rounds, "drafted": stats.drafted, "accepted": stats.accepted}
                found.append({"prompt": prompt, "way": way, "drafts": drafts, "tokens": text, **counts})
    return found


def rows(engine: GraphEngine) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Outputs of rows alone, and how far the rows of longer passes are from them."""
    text = np.random.default_rng(0).integers(3, engine.manifest.vocab_size, BASES[-1] + PASSES[-1]).tolist()
    kept: list[list[np.ndarray]] = []
    found = [{"tokens": count, "rows": 0, "differ": 0, "state": 0.0} for count in PASSES]
    for base in BASES:
        prefill(engine, text[:base])
        alone = []
        for i in range(PASSES[-1]):
            engine.position = base + i
            alone.append([output[0].copy() for output in engine.run_target([text[base + i]], [0])])
        kept += alone
        for seen in found:
            engine.position = base
            together = engine.run_target(text[base : base + seen["tokens"]], range(seen["tokens"]))
            for i, one in enumerate(alone[: seen["tokens"]]):
                several = [output[i] for output in together]
                seen["rows"] += 1
                seen["differ"] += any(not np.array_equal(a, b) for a, b in zip(one, several, strict=True))
                seen["state"] = max(seen["state"], distance(one, several)["state"])
    names = ("logits", "ids", "state")
    return {name: np.array(values) for name, values in zip(names, zip(*kept, strict=True), strict=True)}, found


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> Mapping[str, float]:
    """Of one row's top logits [k], top ids [k] and state [E]: largest differences, and whether the ids differ.

    Logits are compared by token, of the tokens that both have.
    """
    (logits, ids, state), (other_logits, other_ids, other_state) = ours, theirs
    known = dict(zip(other_ids.tolist(), other_logits.tolist(), strict=True))
    apart = [abs(logit - known[i]) for i, logit in zip(ids.tolist(), logits.tolist(), strict=True) if i in known]
    return {
        "logits": max(apart, default=float("inf")),
        "state": float(np.abs(state - other_state).max()),
        "ids_differ": int(not np.array_equal(ids, other_ids)),
    }


def prefill(engine: GraphEngine, tokens: list[int]) -> None:
    """Write a text from position 0 on."""
    engine.position, step = 0, engine.manifest.limits["num_tokens"]
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        engine.run_target(chunk, [len(chunk) - 1])
        engine.position += len(chunk)


if __name__ == "__main__":
    main()
