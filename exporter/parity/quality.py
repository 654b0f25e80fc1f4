"""Measure what a recipe costs: a bundle's logits, choices and accepted drafts against its checkpoints in float32."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.modeling.target import SUPPRESSED_LOGIT, Target, empty_kv, is_suppressed
from exporter.parity.checks import Check
from exporter.parity.reference import Reference
from exporter.quantization.recipes import RECIPES
from runtime_ref.decoder import Options, generate
from runtime_ref.graph_engine import GraphEngine, chunks
from runtime_ref.manifest import EMBEDDING, HEAD
from runtime_ref.stats import Stats

HEAD_BLOCK_ROWS = 8192  # of the head that are in memory at a time


@dataclass(frozen=True)
class Quality:
    """How close a bundle is to its checkpoints in float32.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio of the bundle's top logits, in dB; infinite if they are equal.
        agreement: fraction of positions at which both choose the same token.
        kl: mean over positions of the KL divergence KL(checkpoint || bundle) of the next token, in nats.
        positions: how many positions were compared.
        acceptance: acceptance rate of the checkpoints' own drafts in float32; None if there were none.
    """

    sqnr_db: float
    agreement: float
    kl: float
    positions: int
    acceptance: float | None

    @property
    def figures(self) -> dict[str, float | None]:
        """The measurements by the names that `parity --json` has for them."""
        return {
            "acceptance_rate_fp32": self.acceptance,
            "choices_kept": self.agreement,
            "kl": self.kl,
            "sqnr_db": self.sqnr_db,
            "positions": self.positions,
        }


def quality_checks(quality: Quality, acceptance: float | None) -> Iterator[Check]:
    """Yield what a recipe costs as checks; nothing is judged, except that logits of NaN fail.

    Args:
        quality: the bundle's.
        acceptance: acceptance rate of the bundle's drafts; None if there were none.
    """
    details = (
        ("logits", f"SQNR {quality.sqnr_db:.1f} dB"),
        ("choices", f"{quality.agreement:.1%} of {quality.positions} top-1 equal"),
        ("tokens", f"KL {quality.kl:.4f} nats"),
        ("drafts", f"{_share(acceptance)} accepted, {_share(quality.acceptance)} in fp32"),
    )
    for output, detail in details:
        yield Check("recipe", f"{output} against fp32", not np.isnan(quality.sqnr_db), detail=detail)


def _share(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.1%}"


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
    divergences: list[torch.Tensor] = []
    for prompt in prompts:
        options = Options(max_new_tokens, manifest.default_draft_tokens)
        text = [*prompt, *generate(eager, prompt, options, stats)]
        expected = logits_after(target, text, len(text))
        logits, ids, states = bundle_logits(engine, text)
        divergences.append(kl_divergence(expected, all_logits(engine, logits, ids, states)))
        exact, known = expected.gather(1, ids).double(), ~is_suppressed(logits)
        error = (logits - exact)[known]
        signal, noise = signal + float((exact[known] ** 2).sum()), noise + float((error**2).sum())
        equal.append((ids[:, 0] == expected.argmax(1)).numpy())
    agreement = np.concatenate(equal)
    return Quality(
        sqnr_db=float(10 * np.log10(signal / noise)) if noise else float("inf"),
        agreement=float(agreement.mean()),
        kl=float(torch.cat(divergences).mean()),
        positions=len(agreement),
        acceptance=stats.acceptance_rate,
    )


def bundle_logits(engine: GraphEngine, text: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a bundle's target over a text and return what it computes after each token.

    Args:
        engine: runs the bundle; its cache is overwritten.
        text: T token ids.

    Returns:
        Top logits [T, k] float32, the largest first, their ids [T, k] int64, and states [T, E] float32.
    """
    parts = []
    for start, tokens in chunks(text, engine.manifest.limits["num_outputs"]):
        engine.position = start
        outputs = engine.run_target(tokens, range(len(tokens)))
        parts.append([torch.from_numpy(output.copy()) for output in outputs])
    logits, ids, states = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return logits, ids, states


def all_logits(engine: GraphEngine, logits: Tensor, ids: Tensor, states: Tensor) -> Tensor:
    """Return the logits of all tokens: the bundle's own where it gives them, the others from its states and its head.

    The graph may round what it multiplies with the head, so the others are near the bundle's, not equal.

    Args:
        engine: runs the bundle.
        logits: [T, k] float32, the bundle's.
        ids: [T, k] int64, their tokens.
        states: [T, E] float32.

    Returns:
        [T, V] float32.
    """
    manifest, head = engine.manifest, engine.tables.get(HEAD, engine.tables[EMBEDDING])
    softcap = manifest.raw["target"].get("final_logit_softcapping")
    result = torch.empty(len(states), manifest.vocab_size)
    for start in range(0, manifest.vocab_size, HEAD_BLOCK_ROWS):
        block = range(start, min(start + HEAD_BLOCK_ROWS, manifest.vocab_size))
        product = states @ torch.from_numpy(np.asarray(head[block])).T
        result[:, block.start : block.stop] = softcap * torch.tanh(product / softcap) if softcap else product
    result[:, manifest.raw["tokens"].get("suppressed", [])] = SUPPRESSED_LOGIT
    return result.scatter_(1, ids, logits)


def kl_divergence(expected: Tensor, actual: Tensor) -> Tensor:
    """Return KL(expected || actual) of the distributions that logits give, [T] float64, in nats.

    Args:
        expected: logits [T, V] float32.
        actual: logits of the same tokens.
    """
    divergences = []
    for rows in zip(expected, actual, strict=True):  # in float64, all of them would take gigabytes at full size
        log_p, log_q = (logits.double().log_softmax(0) for logits in rows)
        divergences.append((log_p.exp() * (log_p - log_q)).masked_fill(is_suppressed(rows[0]), 0).sum())
    return torch.stack(divergences)


def logits_after(target: Target, tokens: Sequence[int], count: int) -> torch.Tensor:
    """Return the target's logits [count, V] after each of the last `count` tokens of a text of token ids."""
    rows = torch.arange(len(tokens) - count, len(tokens))
    kv = empty_kv(target.config, len(tokens))
    return target(torch.tensor(tokens), torch.tensor([0]), rows, kv).logits
