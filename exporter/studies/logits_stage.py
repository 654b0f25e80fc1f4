"""Measure the logits stage: what it takes for each token at Gemma's vocabulary, and how many drafts are accepted.

    python -m exporter.studies.logits_stage

For times, the vocabulary is made of pieces of the package's texts, the table of random integers, the logits of noise;
compare figures of one run with each other. Acceptance is that of the built-in pair.
"""

import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from exporter import texts
from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.demo import PAIR
from exporter.demo.corpus import documents
from exporter.quantization.recipes import RECIPES
from runtime_ref.drafts import GRAMMAR
from runtime_ref.grammar import Grammar, Vocabulary, json_grammar, regex_grammar
from runtime_ref.graph_engine import GraphEngine
from runtime_ref.manifest import EMBEDDING, Manifest
from runtime_ref.rules import RuledChooser, Rules
from runtime_ref.sampling import MAX_TOP_K, Chooser, Sampling
from runtime_ref.streaming import open_decoder
from runtime_ref.tables import Table
from runtime_ref.text_parts import PartTracker

VOCAB, WIDTH, GROUP = 262_144, 1_536, 32  # E2B's
PROMPT_TOKENS, ANSWER_TOKENS = 1_000, 500
EOS = 1
RULES = {
    "5 suppressed tokens": Rules(frozenset(range(5))),
    "10 negative biases": Rules(logit_bias=dict.fromkeys(range(10), -5.0)),
    "repetition penalty 1.2": Rules(repetition_penalty=1.2),
    "presence penalty 1": Rules(presence_penalty=1.0),
    "frequency penalty 0.5": Rules(frequency_penalty=0.5),
    "10 positive biases": Rules(logit_bias=dict.fromkeys(range(10), 5.0)),
    "presence penalty -1": Rules(presence_penalty=-1.0),
    "repetition penalty 0.9": Rules(repetition_penalty=0.9),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["function", "class", "module"]},
        "size": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "place": {"type": "object", "properties": {"file": {"type": "string"}, "line": {"type": "integer"}}},
    },
    "required": ["name", "kind", "size", "tags", "place"],
    "additionalProperties": False,
}
TEXTS, NEW_TOKENS = 30, 60
ACCEPTANCE: dict[str, dict[str, Any]] = {
    "no rule": {},
    "repetition penalty 1.2": {"repetition_penalty": 1.2},
    "presence penalty 1": {"presence_penalty": 1.0},
    "frequency penalty 0.5": {"frequency_penalty": 0.5},
    "JSON Schema": {"json_schema": SCHEMA},
    "regular expression of words": {"regex": r"( [a-z]+)+\."},
}
GRAMMARS: dict[str, Callable[[Vocabulary], Grammar]] = {
    "JSON Schema": lambda vocabulary: json_grammar(vocabulary, SCHEMA),
    "any JSON object": lambda vocabulary: json_grammar(vocabulary, {"type": "object"}),
    "regular expression of words": lambda vocabulary: regex_grammar(vocabulary, r"([A-Z][a-z]+( [a-z]+)*\. )+"),
    "regular expression of dates": lambda vocabulary: regex_grammar(vocabulary, r"(\d{4}-\d\d-\d\d\n)+"),
}


def tokenizer_json() -> str:
    """Return a tokenizer.json of `VOCAB` tokens: bytes, pieces of words by their frequency, and pairs of these."""
    counts: dict[str, int] = {}
    folder = Path(next(iter(texts.__path__)))
    for file in sorted(folder.glob("*.txt")):
        for word in re.findall(r" ?\S+|\s+", file.read_text(encoding="utf-8")):
            spelled = word.replace(" ", "▁")
            for start in range(len(spelled)):
                for end in range(start + 1, min(start + 13, len(spelled)) + 1):
                    counts[spelled[start:end]] = counts.get(spelled[start:end], 0) + 1
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(counts, key=lambda p: (-counts[p], p))]
    vocabulary, generator = dict.fromkeys(pieces[:VOCAB]), random.Random(0)
    common = pieces[260:20_000]
    while len(vocabulary) < VOCAB:
        vocabulary[generator.choice(common) + generator.choice(common)] = None
    return json.dumps(
        {
            **{"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "pre_tokenizer": None},
            "added_tokens": [
                {
                    **{"id": number, "content": content, "special": True, "normalized": False},
                    **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
                }
                for number, content in enumerate(special)
            ],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True},
                **{"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False},
                **{"vocab": {piece: number for number, piece in enumerate(vocabulary)}, "merges": []},
            },
        }
    )


def engine(folder: Path, generator: np.random.Generator) -> GraphEngine:
    """Return an engine without graphs, whose head is a table of E2B's size in 4 bits.

    Args:
        folder: for the table's file.
        generator: of its numbers.
    """
    with (folder / "table").open("wb") as file:
        file.write(generator.integers(0, 256, (VOCAB, WIDTH // 2), np.uint8).tobytes())
        file.write((generator.random((VOCAB, WIDTH // GROUP), np.float32) * 0.02).tobytes())
    parts = [[{"file": "table", "offset": at, "rows": VOCAB}] for at in (0, VOCAB * WIDTH // 2)]
    entry = {
        **{"rows": VOCAB, "columns": WIDTH, "encoding": "uint4", "row_bytes": WIDTH // 2, "group_size": GROUP},
        **{"data": {"parts": parts[0]}, "scales": {"dtype": "float32", "parts": parts[1]}},
    }
    raw = {"target": {"final_logit_softcapping": 30.0}}
    manifest = SimpleNamespace(kv=(), hidden_size=WIDTH, vocab_size=VOCAB, eos=frozenset({EOS}), raw=raw)
    return GraphEngine(cast(Manifest, manifest), {}, {EMBEDDING: Table(folder, entry)})


def median_seconds(call: Callable[[], Any], times: int) -> float:
    """Return the median time of a call, in seconds.

    Args:
        call: what is measured.
        times: how often it is called.
    """
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def rules_report(made: GraphEngine, generator: np.random.Generator) -> None:
    """Print what a choice takes under each rule, and what exact scores take.

    Args:
        made: an engine.
        generator: of logits and tokens.
    """
    logits = -np.sort(-generator.normal(15, 4, MAX_TOP_K).astype(np.float32))
    state = generator.standard_normal(WIDTH).astype(np.float32)
    prompt, answer = (generator.integers(0, VOCAB, n).tolist() for n in (PROMPT_TOKENS, ANSWER_TOKENS))
    sampling = Sampling(1.0, 0.95, seed=1)
    choosers: dict[str, Chooser] = {"no rule": sampling}
    for name, rules in RULES.items():
        ruled = RuledChooser(sampling, rules, prompt, VOCAB, made.score)
        for token in answer:
            ruled.commit(token)
        choosers[name] = ruled
    print(f"choosing a token, after {PROMPT_TOKENS} tokens of prompt and {ANSWER_TOKENS} of answer:")
    for name, chooser in choosers.items():
        ids = generator.choice(VOCAB, MAX_TOP_K, replace=False)
        print(f"  {name:30} {median_seconds(partial(chooser.pick, logits, ids, state, 7), 30) * 1e6:8.0f} us")
    print("logits of other tokens, from the state and the head:")
    for count in (1, 64, 1024, VOCAB):
        seconds = median_seconds(partial(made.score, state, range(count)), 5 if count < VOCAB else 1)
        print(f"  {count:30} {seconds * 1e3:8.1f} ms")


def grammar_report(folder: Path, made: GraphEngine) -> None:
    """Print what llguidance takes: for the vocabulary, for a grammar, and for the mask of each token.

    Args:
        folder: for the tokenizer.
        made: an engine.
    """
    (folder / "tokenizer.json").write_text(tokenizer_json())
    started = time.perf_counter()
    vocabulary = Vocabulary(folder, made.manifest)
    print(f"llguidance: the vocabulary, once for each bundle: {time.perf_counter() - started:.2f} s")
    for name, make in GRAMMARS.items():
        started = time.perf_counter()
        grammar = make(vocabulary)
        compiled = time.perf_counter() - started
        masks, others, generator = list[float](), list[float](), random.Random(1)
        for _ in range(20):
            text = grammar.begin(PartTracker({}))
            for _ in range(50):
                before = time.perf_counter()
                mask = text.mask()
                masked = time.perf_counter()
                assert mask is not None
                allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
                token = int(allowed[generator.randrange(len(allowed))])
                again = time.perf_counter()
                text.commit(token)
                if text.binds:
                    text.forced(8)
                others.append(time.perf_counter() - again)
                masks.append(masked - before)
                if token == EOS:
                    break
        slowest = sorted(masks)[len(masks) * 99 // 100]
        print(
            f"  {name:30} compiled in {compiled * 1e3:6.1f} ms; mask {statistics.median(masks) * 1e6:6.0f} us, of 1 %"
            f" {slowest * 1e6:6.0f} us or more; token and forced run {statistics.median(others) * 1e6:5.0f} us"
        )


def acceptance_report(folder: Path) -> None:
    """Print how many of 4 drafts a round are accepted under each rule, for the built-in pair on held-out beginnings.

    Args:
        folder: for the bundle.
    """
    pair = open_pair(PAIR / "target", PAIR / "drafter")
    export_bundle(pair, folder / "bundle", ExportOptions("onnx", RECIPES["fp32"], max_seq_len=256))
    decoder = open_decoder(folder / "bundle", threads=1)
    assert decoder.tokenizer is not None
    prompts = [decoder.tokenizer.encode(text)[:12] for text in documents()[1][:TEXTS]]
    print(f"accepted drafts, {TEXTS} texts of the built-in pair, up to {NEW_TOKENS} tokens, greedy and sampled:")
    for name, options in ACCEPTANCE.items():
        shares = []
        for temperature in (0.0, 1.0):
            total, forced = Counter[str](), Counter[str]()
            for seed, prompt in enumerate(prompts):
                stream = decoder.stream(
                    prompt,
                    max_new_tokens=NEW_TOKENS,
                    num_draft_tokens=4,
                    temperature=temperature,
                    top_p=1.0,
                    seed=seed,
                    **options,
                )
                for _ in stream:
                    pass
                for source, counts in stream.stats.sources.items():
                    (forced if source == GRAMMAR else total).update(vars(counts))
            shares.append(
                f"{total['accepted'] / total['drafted']:4.0%} of the drafter's"
                + (f", {forced['accepted']} of {forced['drafted']} forced" if forced else "")
            )
        print(f"  {name:30} {'; '.join(shares)}")


def main() -> None:
    """Print the report."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        made = engine(Path(folder), generator)
        rules_report(made, generator)
        grammar_report(Path(folder), made)
        acceptance_report(Path(folder))


if __name__ == "__main__":
    main()
