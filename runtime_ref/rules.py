"""Rules that change logits before a token is chosen: suppressed tokens, biases, penalties and a grammar.

A rule depends on the position and on the text before it, never on what was drafted, so speculative and plain decoding
choose the same tokens. FORMAT.md ("Rules before the choice") has the arithmetic.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime_ref.engine import Engine
from runtime_ref.errors import InputError
from runtime_ref.grammar import Grammar, GrammarText
from runtime_ref.manifest import Manifest
from runtime_ref.manifest_form import REPETITION_RANGE
from runtime_ref.sampling import MAX_TOP_K, Sampling, choose, log_probabilities
from runtime_ref.text_parts import ANSWER, THOUGHT, TOOL_CALL, PartTracker
from runtime_ref.thinking import ThoughtLimit

MAX_BIAS = 100  # of a token, in either direction, as OpenAI's interface and vLLM have it
MAX_PENALTY = 2  # presence and frequency, as there

Score = Callable[[np.ndarray, Sequence[int]], np.ndarray]  # as `Engine.score`


class Constraint(Protocol):
    """What forbids tokens by the text so far: a `GrammarText` or a `ThoughtLimit`."""

    def commit(self, token: int) -> None:
        """Go on by a token of the text."""
        ...

    def num_allowed(self, drafts: Sequence[int]) -> int:
        """Return how many of the drafts may come next, in their order."""
        ...


@dataclass(frozen=True)
class Rules:
    """What changes logits before a token is chosen; the default changes nothing.

    Attributes:
        suppressed: ids of tokens that are never chosen.
        logit_bias: by token id, what is added to its logit, -100 to 100.
        repetition_penalty: 0.01 to 100. Logits of tokens that are in the prompt or in the answer so far are divided by
            it if they are positive, else multiplied (CTRL, Keskar et al. 2019); 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that are in the answer so far, -2 to 2.
        frequency_penalty: subtracted from the logit of a token as many times as it is in the answer so far, -2 to 2.

    Raises:
        InputError: a value is out of its range.
    """

    suppressed: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        least, most = REPETITION_RANGE
        if not least <= self.repetition_penalty <= most:
            raise InputError(f"repetition penalty is {self.repetition_penalty}, expected {least} to {most}; 1 is none")
        for name in ("presence", "frequency"):
            penalty = getattr(self, f"{name}_penalty")
            if not abs(penalty) <= MAX_PENALTY:
                raise InputError(f"{name} penalty is {penalty}, expected -{MAX_PENALTY} to {MAX_PENALTY}")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MAX_BIAS:
                raise InputError(
                    f"the logit bias of token {token} is {bias}, expected -{MAX_BIAS} to {MAX_BIAS}; suppress a"
                    " token that must never come"
                )


def check_rules(manifest: Manifest, rules: Rules) -> None:
    """Refuse rules about tokens that a bundle does not have.

    Args:
        manifest: the bundle's.
        rules: what the caller asks for.

    Raises:
        InputError: a token id is not in the vocabulary.
    """
    for token in (*rules.suppressed, *rules.logit_bias):
        if not 0 <= token < manifest.vocab_size:
            raise InputError(f"a rule names token id {token}, expected 0 to {manifest.vocab_size - 1}")


class RuledChooser:
    """Chooses the tokens of one text by rules and sampling; a `sampling.Chooser` that keeps the text's tokens.

    Candidates are the bundle's largest logits and the tokens that a rule can raise above them, whose logits are
    computed from the state. Where the rules leave none of them at least as large as the bundle's smallest, the logits
    of all tokens that they allow are computed. So the largest is that of the whole vocabulary.
    """

    def __init__(
        self,
        sampling: Sampling,
        rules: Rules,
        prompt: Sequence[int],
        vocab_size: int,
        score: Score,
        grammars: Sequence[GrammarText] = (),
        limit: ThoughtLimit | None = None,
        never: Collection[int] = (),
    ) -> None:
        """Begin a text.

        Args:
            sampling: how tokens are chosen once the rules were applied.
            rules: what changes logits.
            prompt: token ids of the prompt.
            vocab_size: V.
            score: computes logits from a state, as `Engine.score`.
            grammars: what parts of the text must match, at their beginning; no two bind the same token.
            limit: how long the model may think; None for no limit.
            never: ids of tokens that the bundle itself suppresses.
        """
        self._sampling, self._rules, self._score = sampling, rules, score
        self._grammars, self._limit = grammars, limit
        self._constraints: list[Constraint] = [*grammars, *([limit] if limit else [])]
        # Arrays by token id, so that a rule is one look-up for all candidates.
        self._free = np.ones(vocab_size, bool)
        self._free[list(rules.suppressed | {token for token in never if token < vocab_size})] = False
        self._bias = np.zeros(vocab_size)
        self._bias[list(rules.logit_bias)] = list(rules.logit_bias.values())
        self._seen = np.zeros(vocab_size, bool)
        self._seen[list(prompt)] = True
        self._counts = np.zeros(vocab_size, np.int64)
        # Tokens whose logits a rule may raise: only these can overtake the bundle's largest.
        self._raised = {token for token, bias in rules.logit_bias.items() if bias > 0}
        self._raises_answer = rules.repetition_penalty < 1 or min(rules.presence_penalty, rules.frequency_penalty) < 0
        if rules.repetition_penalty < 1:
            self._raised.update(prompt)

    def pick(self, logits: np.ndarray, ids: np.ndarray, state: np.ndarray, position: int) -> tuple[int, float]:
        """Choose the next token, as `Chooser.pick`.

        Raises:
            InputError: the rules allow no token here.
        """
        mask = next((mask for grammar in self._grammars if (mask := grammar.mask()) is not None), None)
        raised = sorted(self._raised.difference(ids.tolist()))
        candidates, values, ruled = self._candidates(logits, ids, state, raised, mask)
        # Tokens that are neither the bundle's nor raised have no larger logits than the bundle's last.
        if ruled.max(initial=-np.inf) < logits[-1]:
            others = np.setdiff1d(np.flatnonzero(self._allowed(np.arange(len(self._free)), mask)), ids)
            candidates, values, ruled = self._candidates(logits, ids, state, others.tolist(), mask)
        if not len(candidates):
            raise InputError(
                f"the rules allow no token at position {position} of the text; suppress fewer tokens, or change the"
                " grammar"
            )
        order = np.lexsort((candidates, -ruled))[:MAX_TOP_K]
        chosen = order[choose(ruled[order], position, self._sampling)]
        token, logprob = int(candidates[chosen]), _log_probability(values[chosen], logits)
        self.commit(token)
        return token, logprob

    def _candidates(
        self, logits: np.ndarray, ids: np.ndarray, state: np.ndarray, others: Sequence[int], mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, logits and logits after the rules of the bundle's tokens and others, without what is forbidden."""
        values = logits.astype(np.float64)
        if others:
            ids, values = np.concatenate([ids, others]), np.concatenate([values, self._score(state, others)])
        allowed = self._allowed(ids, mask)
        if not allowed.all():
            ids, values = ids[allowed], values[allowed]
        return ids, values, self._apply(values, ids)

    def commit(self, token: int) -> None:
        """Count a token as the next of the text; `pick` does so with what it chose.

        Args:
            token: its id.
        """
        self._seen[token] = True
        self._counts[token] += 1
        if self._raises_answer:
            self._raised.add(token)
        for constraint in self._constraints:
            constraint.commit(token)

    def forced(self, max_tokens: int) -> Sequence[int]:
        """Return the tokens that a grammar or the limit of a thought forces next, at most `max_tokens`.

        While tokens are forced, nothing but the first of them is allowed, so as drafts they are accepted.
        """
        if self._limit and self._limit.forced is not None:
            return [self._limit.forced][:max_tokens]
        forced = next((forced for grammar in self._grammars if (forced := grammar.forced(max_tokens))), [])
        return forced[: self._free_tokens(forced)]

    def num_allowed(self, drafts: Sequence[int]) -> int:
        """Return how many of the drafts may come next, in their order: those before the first that is forbidden."""
        count = self._free_tokens(drafts)
        for constraint in self._constraints:
            count = constraint.num_allowed(drafts[:count])
        return count

    def _free_tokens(self, drafts: Sequence[int]) -> int:
        """How many of the drafts come before the first suppressed one."""
        suppressed = np.flatnonzero(~self._free[list(drafts)])
        return int(suppressed[0]) if len(suppressed) else len(drafts)

    def _allowed(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Whether each of the token ids may be chosen, [n] bool."""
        allowed = self._free[ids]
        if self._limit and self._limit.forced is not None:
            allowed = allowed & (ids == self._limit.forced)
        return allowed if mask is None else allowed & (mask[ids >> 3] >> (ids & 7) & 1).astype(bool)

    def _apply(self, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Logits after biases and penalties, in the order of vLLM."""
        rules, counts = self._rules, self._counts[ids]
        values = values + self._bias[ids]
        if (penalty := rules.repetition_penalty) != 1:
            values = np.where(self._seen[ids], np.where(values > 0, values / penalty, values * penalty), values)
        return values - rules.frequency_penalty * counts - rules.presence_penalty * (counts > 0)


def _log_probability(logit: float, logits: np.ndarray) -> float:
    """The model's own log-probability of a token, also of one that is not among the largest logits."""
    return float(logit - float(logits[0]) + log_probabilities(logits)[0])


def text_chooser(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    rules: Rules,
    grammars: Mapping[str, Grammar],
    opens: Collection[str] = (),
    thinking_budget: int | None = None,
) -> RuledChooser | None:
    """Return what chooses the tokens of a text by rules; None if there are none, and `sampling` alone chooses.

    Args:
        engine: a loaded bundle.
        prompt: token ids.
        sampling: how tokens are chosen once the rules were applied.
        rules: what changes logits.
        grammars: what the `answer`, or each `tool_call`, must match.
        opens: names of channels that may come before an answer that must match.
        thinking_budget: the largest number of tokens of thoughts; None for any.
    """
    if rules == Rules() and not grammars and thinking_budget is None:
        return None
    manifest, limit, texts = engine.manifest, None, []
    never = manifest.raw["tokens"].get("suppressed", ())

    def tracker() -> PartTracker:
        return PartTracker(manifest.channels, manifest.eos, prompt)

    for part, grammar in grammars.items():
        close = manifest.channels[part][1] if part != ANSWER else None
        marks = [manifest.channels[name][0] for name in opens if part == ANSWER]
        texts.append(grammar.begin(tracker(), part, close, marks))
    if thinking_budget is not None:
        limit = ThoughtLimit(tracker(), manifest.channels[THOUGHT][1], thinking_budget)
    return RuledChooser(sampling, rules, prompt, manifest.vocab_size, engine.score, texts, limit, never)


def check_parts(
    manifest: Manifest, grammars: Collection[str], opens: Collection[str], thinking_budget: int | None
) -> None:
    """Refuse rules about parts of a text that a bundle does not have.

    Args:
        manifest: the bundle's.
        grammars: as for `text_chooser`.
        opens: as for `text_chooser`.
        thinking_budget: as for `text_chooser`.

    Raises:
        InputError: a part is no channel of the bundle, or the budget is negative.
    """
    if thinking_budget is not None and thinking_budget < 0:
        raise InputError(f"the thinking budget is {thinking_budget} tokens, expected 0 or more")
    needed = {*grammars, *opens, *([] if thinking_budget is None else [THOUGHT])} - {ANSWER}
    for part in sorted(needed - manifest.channels.keys()):
        raise InputError(f"{_NEEDS[part]}, and the bundle's chat template marks none; leave it out")


_NEEDS = {THOUGHT: "a thinking budget is about thoughts", TOOL_CALL: "a grammar of calls needs calls of tools"}
