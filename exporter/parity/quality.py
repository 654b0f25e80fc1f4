"""Measure what a recipe costs: a bundle's logits, choices and accepted drafts against its checkpoints in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporter.checkpoint.pair import Pair
from exporter.modeling.target import Target, empty_kv, is_suppressed
from exporter.parity.reference import Reference
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.graph_engine import GraphEngine, chunks
from runtime_ref.stats import Stats


@dataclass(frozen=True)
class Quality:
    """How close a bundle is to its checkpoints in float32.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio of the bundle's top logits, in dB; infinite if they are equal.
        agreement: fraction of positions at which both choose the same token.
        positions: how many positions were compared.
        acceptance: acceptance rate of the checkpoints' own drafts in float32.
    """

    sqnr_db: float
    agreement: float
    positions: int
    acceptance: float


@torch.no_grad()
def measure_quality(engine: GraphEngine, pair: Pair, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Quality:
    """Compare a bundle with its checkpoints on prompts and on the greedy answers of the checkpoints in float32.

    Args:
        engine: runs the bundle.
        pair: the checkpoints it was made from.
        prompts: token ids.
        max_new_tokens: length limit of each answer, in tokens.
    """
    manifest, reference = engine.manifest, Reference(pair, RECIPES["fp32"])
    eager, target, stats = reference.engine(manifest), reference.target(), Stats()
    signal = noise = 0.0
    equal: list[np.ndarray] = []
    for prompt in prompts:
        options = Options(max_new_tokens, manifest.default_draft_tokens)
        text = [*prompt, *generate(eager, prompt, options, stats)]
        expected = logits_after(target, text, len(text))
        logits, ids = bundle_logits(engine, text)
        exact, known = expected.gather(1, ids).double(), ~is_suppressed(logits)
        error = (logits - exact)[known]
        signal, noise = signal + float((exact[known] ** 2).sum()), noise + float((error**2).sum())
        equal.append((ids[:, 0] == expected.argmax(1)).numpy())
    agreement = np.concatenate(equal)
    return Quality(
        sqnr_db=float(10 * np.log10(signal / noise)) if noise else float("inf"),
        agreement=float(agreement.mean()),
        positions=len(agreement),
        acceptance=stats.acceptance_rate or 0.0,
    )


def bundle_logits(engine: GraphEngine, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a bundle's target over a text and return what it computes after each token.

    Args:
        engine: runs the bundle; its cache is overwritten.
        text: T token ids.

    Returns:
        Top logits [T, k] float32 and their ids [T, k] int64, the largest logit first.
    """
    parts = []
    for start, tokens in chunks(text, engine.manifest.limits["num_outputs"]):
        engine.position = start
        logits, ids, _ = engine.run_target(tokens, range(len(tokens)))
        parts.append((torch.from_numpy(logits.copy()), torch.from_numpy(ids.copy())))
    return torch.cat([logits for logits, _ in parts]), torch.cat([ids for _, ids in parts])


def logits_after(target: Target, tokens: Sequence[int], count: int) -> torch.Tensor:
    """Return the target's logits [count, V] after each of the last `count` tokens of a text of token ids."""
    rows = torch.arange(len(tokens) - count, len(tokens))
    kv = empty_kv(target.config, len(tokens))
    return target(torch.tensor(tokens), torch.tensor([0]), rows, kv).logits
