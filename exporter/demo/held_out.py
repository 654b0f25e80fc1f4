"""Measure the acceptance rate of a pair's drafts on texts, for training and for studies of the built-in pair."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import Pair
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import open_engine
from runtime_ref.stats import Stats
from runtime_ref.tokenizer import TextTokenizer

PROMPT_TOKENS, DRAFT_TOKENS = 12, 4


def measure_acceptance(pair: Pair, texts: Sequence[str], new_tokens: int) -> dict[str, float]:
    """Continue the beginnings of texts greedily with a temporary bundle, and count accepted drafts.

    Args:
        pair: a pair with a tokenizer. It is exported in float32 for ONNX Runtime.
        texts: the first `PROMPT_TOKENS` tokens of each text are a prompt.
        new_tokens: maximum number of new tokens for each prompt.

    Returns:
        `acceptance_rate` (0 to 1), `drafted` (number of draft tokens) and `verify_passes` (passes of the target that
        verified drafts) over all texts.
    """
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "bundle"
        export_bundle(pair, bundle, ExportOptions("onnx", RECIPES["fp32"], max_seq_len=256))
        engine = open_engine(bundle, threads=1)
        tokenizer = TextTokenizer(bundle, engine.manifest)
        drafted = accepted = rounds = 0
        for text in texts:
            stats = Stats()
            for _ in generate(engine, tokenizer.encode(text)[:PROMPT_TOKENS], Options(new_tokens, DRAFT_TOKENS), stats):
                pass
            drafted, accepted, rounds = drafted + stats.drafted, accepted + stats.accepted, rounds + stats.rounds
    return {"acceptance_rate": accepted / drafted, "drafted": drafted, "verify_passes": rounds}
