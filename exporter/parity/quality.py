"""Measure what a recipe costs: a bundle's logits, choices and accepted drafts against its checkpoints in float32."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.checkpoint.pair import Pair
from exporter.modeling.target import SUPPRESSED_LOGIT, Target, empty_kv, is_suppressed
from exporter.parity.checks import Check
from exporter.parity.reference import Reference
from exporter.quantization.recipes import RECIPES
from exporter.texts.token_texts import TokenTexts
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
        whole: what was measured on all texts.
        kinds: the same by the kind of the texts, "prose", "code" or "chat"; empty if they have none.
        acceptance: acceptance rate of the checkpoints' own drafts in float32; None if there were none.
    """

    sqnr_db: float
    whole: "OnTexts"
    kinds: dict[str, "OnTexts"]
    acceptance: float | None

    @property
    def figures(self) -> dict[str, float | None]:
        """The measurements by the names that `parity --json` has for them."""
        return {
            "acceptance_rate_fp32": self.acceptance,
            "choices_kept": self.whole.agreement,
            "kl": self.whole.kl,
            "perplexity": self.whole.perplexity,
            "perplexity_fp32": self.whole.perplexity_fp32,
            "sqnr_db": self.sqnr_db,
            "positions": self.whole.positions,
        }


@dataclass(frozen=True)
class OnTexts:
    """How close a bundle is to its checkpoints on some texts.

    Attributes:
        agreement: fraction of positions at which both choose the same token.
        kl: mean over positions of the KL divergence KL(checkpoint || bundle) of the next token, in nats.
        perplexity: of the bundle, exp of its mean loss on the texts' own next tokens; NaN where it has none.
        perplexity_fp32: the same of the checkpoints in float32.
        positions: how many positions were compared.
    """

    agreement: float
    kl: float
    perplexity: float
    perplexity_fp32: float
    positions: int

    @classmethod
    def of(cls, measured: Tensor) -> "OnTexts":
        """Summarize positions [positions, 4] float64: equal choices, divergence, and both losses or NaN."""
        equal, divergence, loss, loss_fp32 = measured.unbind(1)
        perplexity, perplexity_fp32 = (float(column.nanmean().exp()) for column in (loss, loss_fp32))
        return cls(float(equal.mean()), float(divergence.mean()), perplexity, perplexity_fp32, len(measured))


def quality_checks(quality: Quality, acceptance: float | None) -> Iterator[Check]:
    """Yield what a recipe costs as checks; nothing is judged, except that logits of NaN fail.

    Args:
        quality: the bundle's.
        acceptance: acceptance rate of the bundle's drafts; None if there were none.
    """
    details = (
        ("logits", f"SQNR {quality.sqnr_db:.1f} dB"),
        ("choices", f"{quality.whole.agreement:.1%} of {quality.whole.positions} top-1 equal"),
        ("tokens", f"KL {quality.whole.kl:.4f} nats"),
        *((kind, _on_texts(on_texts)) for kind, on_texts in quality.kinds.items()),
        ("drafts", f"{_share(acceptance)} accepted, {_share(quality.acceptance)} in fp32"),
    )
    for output, detail in details:
        yield Check("recipe", f"{output} against fp32", not np.isnan(quality.sqnr_db), detail=detail)


def _on_texts(found: OnTexts) -> str:
    perplexities = f"{found.perplexity:.4g}, {found.perplexity_fp32:.4g} in fp32"
    return f"KL {found.kl:.4f}, {found.agreement:.1%} of {found.positions} choices kept, perplexity {perplexities}"


def _share(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.1%}"


@torch.no_grad()
def measure_quality(
    engine: GraphEngine,
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    held_out: TokenTexts | None = None,
) -> Quality:
    """Compare a bundle with its checkpoints in float32.

    Args:
        engine: runs the bundle.
        pair: the checkpoints it was made from.
        prompts: token ids; the checkpoints' own drafts are counted in greedy answers to them.
        max_new_tokens: length limit of each answer, in tokens.
        held_out: texts to compare on, of which the bundle's context must hold the longest; None for the prompts and
            the answers.
    """
    manifest, reference = engine.manifest, Reference(pair.with_activations(), RECIPES["fp32"], engine.manifest.backend)
    eager, target, stats = reference.engine(manifest), reference.target(), Stats()
    signal = noise = 0.0
    options = Options(max_new_tokens, manifest.default_draft_tokens)
    texts: list[Sequence[int]] = [[*prompt, *generate(eager, prompt, options, stats)] for prompt in prompts]
    kinds = [""] * len(texts)
    if held_out is not None:
        texts, kinds = list(held_out.texts), [kind.partition(" ")[0] for kind in held_out.kinds]
    by_kind: dict[str, list[Tensor]] = {}
    for text, kind in zip(texts, kinds, strict=True):
        expected = logits_after(target, text, len(text))
        logits, ids, states = bundle_logits(engine, text)
        every, next_tokens = all_logits(engine, logits, ids, states), torch.tensor([*text[1:], 0])
        losses = [F.cross_entropy(x, next_tokens, reduction="none").double() for x in (every, expected)]
        # An answer's tokens are the checkpoints' choices, and a suppressed token's loss is infinite: no perplexity.
        unknown = is_suppressed(expected.gather(1, next_tokens.unsqueeze(1))).squeeze(1)
        unknown[slice(-1, None) if held_out else slice(None)] = True
        losses = [loss.masked_fill(unknown, torch.nan) for loss in losses]
        equal = (ids[:, 0] == expected.argmax(1)).double()
        by_kind.setdefault(kind, []).append(torch.stack([equal, kl_divergence(expected, every), *losses], 1))
        exact, known = expected.gather(1, ids).double(), ~is_suppressed(logits)
        error = (logits - exact)[known]
        signal, noise = signal + float((exact[known] ** 2).sum()), noise + float((error**2).sum())
    measured = {kind: torch.cat(parts) for kind, parts in by_kind.items()}
    return Quality(
        sqnr_db=float(10 * np.log10(signal / noise)) if noise else float("inf"),
        whole=OnTexts.of(torch.cat(list(measured.values()))),
        kinds={kind: OnTexts.of(rows) for kind, rows in measured.items() if kind},
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
    engine.cache.roll_back(0)
    for _, tokens in chunks(text, engine.manifest.limits["num_outputs"]):
        outputs = engine.extend(tokens, range(len(tokens)))
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
