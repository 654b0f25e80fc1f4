"""Whether a bundle's rows are exact: lossless decoding rests on it."""

from pathlib import Path

import numpy as np

from runtime_ref.engine import load_engine
from runtime_ref.graph_engine import GraphEngine, chunks
from runtime_ref.manifest import read_manifest


def assert_rows_are_exact(path: Path) -> None:
    """Compare logits and state of each token of verify passes bitwise with those of a pass of that token alone."""
    engine = load_engine(path, read_manifest(path), threads=1)
    text = np.random.default_rng(0).integers(0, engine.manifest.vocab_size, engine.manifest.max_seq_len).tolist()
    starts = set()
    for base in (1, 30, 252, 380, 510, 590):
        prefill(engine, text[:base])
        alone = []
        for i in range(9):
            engine.cache.roll_back(base + i)
            alone.append(engine.extend([text[base + i]], [0]))
            starts.add(engine.cache.window_start)
        for count in range(2, 10):
            engine.cache.roll_back(base)
            together = engine.run_target(text[base : base + count], range(count))
            for i in range(count):
                for actual, expected in zip(together, alone[i], strict=True):
                    assert np.array_equal(actual[i], expected[0]), f"row {i} of {count} at {base}"
    assert len(starts) > 1


def prefill(engine: GraphEngine, tokens: list[int]) -> None:
    """Write a text from position 0 on."""
    engine.cache.roll_back(0)
    for _, chunk in chunks(tokens, engine.manifest.limits["num_tokens"]):
        engine.extend(chunk, [len(chunk) - 1])
