"""The drafts of a text: from the drafter, or copied from earlier text."""

from collections.abc import Sequence

from runtime_ref.acceptance import Round, common_prefix
from runtime_ref.costs import DRAFTER
from runtime_ref.draft_length import DraftLength, Plan
from runtime_ref.engine import Engine
from runtime_ref.lookup import Lookup

# Names of prompt lookup as a source, by the smallest number of tokens that match. The more match, the likelier is what
# follows, so each has its own acceptance estimate.
LOOKUP_SOURCES = {9: "lookup of 9 or more", 5: "lookup of 5 to 8", 3: "lookup of 3 or 4", 2: "lookup of 2"}


class FixedDrafts:
    """The same number of drafts from the drafter in each round.

    Attributes:
        source: `costs.DRAFTER`.
    """

    def __init__(self, engine: Engine, num_draft_tokens: int) -> None:
        """Draft with an engine.

        Args:
            engine: a loaded bundle.
            num_draft_tokens: K of every round.
        """
        self._engine, self._num_draft_tokens = engine, num_draft_tokens
        self.source = DRAFTER

    def make(self, last: int, max_drafts: int) -> Sequence[int]:
        """Return draft tokens after the newest token.

        Args:
            last: id of the newest token.
            max_drafts: the largest number of drafts.
        """
        return self._engine.draft(last, min(self._num_draft_tokens, max_drafts))

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        """Ignore the outcome of a round: K is fixed."""


class PlannedDrafts:
    """As many drafts as `DraftLength` plans, from the drafter or by prompt lookup.

    What prompt lookup would have proposed is compared with the text in every round, so its estimate needs no trials.
    """

    def __init__(self, engine: Engine, planner: DraftLength, prompt: Sequence[int]) -> None:
        """Begin a text.

        Args:
            engine: a loaded bundle.
            planner: plans the rounds and learns from them.
            prompt: token ids of the prompt, which prompt lookup copies from as well.
        """
        self._engine, self._planner, self.lookup = engine, planner, Lookup()
        self.lookup.extend(prompt)
        self._plan, self._copied, self._lookup_source = Plan(DRAFTER, 0), list[int](), ""

    @property
    def source(self) -> str:
        """The source of the last round's drafts."""
        return self._plan.source

    def make(self, last: int, max_drafts: int) -> Sequence[int]:
        """Return the planned draft tokens after the newest token.

        Args:
            last: id of the newest token.
            max_drafts: the largest number of drafts.
        """
        self.lookup.extend([last])
        matching, self._copied = self.lookup.find(max_drafts)
        self._lookup_source = next((name for smallest, name in LOOKUP_SOURCES.items() if matching >= smallest), "")
        copied = {self._lookup_source: max_drafts} if self._copied else {}
        self._plan = self._planner.plan({DRAFTER: max_drafts} | copied)
        if self._plan.source != DRAFTER:
            return self._copied[: self._plan.num_draft_tokens]
        return self._engine.draft(last, self._plan.num_draft_tokens)

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        """Learn from the outcome of a round.

        Args:
            done: the round.
            draft_seconds: time of making its drafts.
            verify_seconds: time of its verify pass.
        """
        planner, drafted, by_drafter = self._planner, len(done.drafts), self._plan.source == DRAFTER
        planner.costs.record(drafted, verify_seconds, draft_seconds if by_drafter else None)
        planner.record_loss(self._plan, len(done.tokens))
        planner.learn(DRAFTER, *((drafted, done.accepted) if by_drafter else (0, 0)))
        if not by_drafter:
            planner.learn(self._plan.source, drafted, done.accepted)
        elif self._copied:
            seen = min(len(done.tokens), len(self._copied))
            right = common_prefix(self._copied, done.tokens)
            planner.learn(self._lookup_source, min(right + 1, seen), right)
        self.lookup.extend(done.tokens[:-1])
