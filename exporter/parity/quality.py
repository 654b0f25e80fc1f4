"""What a recipe costs: a bundle's logits, choices and accepted drafts against those of its checkpoints in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporter.checkpoint.pair import Pair
from exporter.modeling.target import Target, empty_kv
from exporter.parity.reference import Reference
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.graph_engine import GraphEngine, chunks
from runtime_ref.stats import Stats


@dataclass(frozen=True)
class Quality:
    """Signal to noise of the top logits in dB, share of equal choices, and acceptance of the checkpoints' drafts."""

    sqnr: float
    agreement: float
    positions: int
    acceptance: float


@torch.no_grad()
def measure_quality(engine: GraphEngine, pair: Pair, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Quality:
    """Compare a bundle with its checkpoints, on prompts and what the checkpoints continue them with, greedily."""
    manifest, reference = engine.manifest, Reference(pair, RECIPES["fp32"])
    eager, target, stats = reference.engine(manifest), reference.target(), Stats()
    signal = noise = 0.0
    equal: list[np.ndarray] = []
    for prompt in prompts:
        options = Options(max_new_tokens, manifest.default_draft_tokens)
        text = [*prompt, *generate(eager, prompt, options, stats)]
        wanted = logits_after(target, text, len(text))
        logits, ids = bundle_logits(engine, text)
        exact = wanted.gather(1, ids).double()
        signal, noise = signal + float((exact**2).sum()), noise + float(((logits - exact) ** 2).sum())
        equal.append((ids[:, 0] == wanted.argmax(1)).numpy())
    agreement = np.concatenate(equal)
    return Quality(
        sqnr=float(10 * np.log10(signal / noise)) if noise else float("inf"),
        agreement=float(agreement.mean()),
        positions=len(agreement),
        acceptance=stats.acceptance_rate or 0.0,
    )


def bundle_logits(engine: GraphEngine, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A bundle's top logits [T, k] float32 and their ids [T, k] int64 after each token of a text."""
    parts = []
    for start, tokens in chunks(text, engine.manifest.limits["num_outputs"]):
        engine.position = start
        logits, ids, _ = engine.run_target(tokens, range(len(tokens)))
        parts.append((torch.from_numpy(logits.copy()), torch.from_numpy(ids.copy())))
    return torch.cat([logits for logits, _ in parts]), torch.cat([ids for _, ids in parts])


def logits_after(target: Target, tokens: Sequence[int], count: int) -> torch.Tensor:
    """Logits [count, V] after the last tokens of a text."""
    rows = torch.arange(len(tokens) - count, len(tokens))
    kv = empty_kv(target.config, len(tokens))
    return target(torch.tensor(tokens), torch.tensor([0]), rows, kv).logits
