"""The drafts of a text: from the drafter, copied from earlier text, or what a grammar forces."""

from collections.abc import Sequence

from runtime_ref.acceptance import Round, common_prefix
from runtime_ref.costs import DRAFTER
from runtime_ref.draft_length import DraftLength, Plan
from runtime_ref.engine import Engine
from runtime_ref.lookup import Lookup
from runtime_ref.rules import RuledChooser

GRAMMAR = "grammar"  # the source of drafts that a grammar forces; they take no time to make

# Names of prompt lookup as a source, by the smallest number of tokens that match. The more match, the likelier is what
# follows, so each has its own acceptance estimate.
LOOKUP_SOURCES = {9: "lookup of 9 or more", 5: "lookup of 5 to 8", 3: "lookup of 3 or 4", 2: "lookup of 2"}


class FixedDrafts:
    """The same number of drafts in each round: what a grammar forces next, else from the drafter.

    Attributes:
        source: `costs.DRAFTER` or `GRAMMAR`, of the last round's drafts.
    """

    def __init__(self, engine: Engine, num_draft_tokens: int, rules: RuledChooser | None = None) -> None:
        """Draft with an engine.

        Args:
            engine: a loaded bundle.
            num_draft_tokens: K of every round, less what the rules forbid.
            rules: chooses the text's tokens; None if no rule does.
        """
        self._engine, self._num_draft_tokens, self._rules = engine, num_draft_tokens, rules
        self.source = DRAFTER

    def make(self, last: int, max_drafts: int) -> Sequence[int]:
        """Return draft tokens after the newest token.

        Args:
            last: id of the newest token.
            max_drafts: the largest number of drafts.
        """
        count = min(self._num_draft_tokens, max_drafts)
        forced = self._rules.forced(count) if self._rules else []
        self.source = GRAMMAR if forced else DRAFTER
        return _allowed(self._rules, forced or self._engine.draft(last, count))

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        """Ignore the outcome of a round: K is fixed."""


class PlannedDrafts:
    """As many drafts as `DraftLength` plans, from the drafter, by prompt lookup, or what a grammar forces.

    What takes no draft step is compared with the text in every round, so its estimate needs no trials.
    """

    def __init__(
        self, engine: Engine, planner: DraftLength, prompt: Sequence[int], rules: RuledChooser | None = None
    ) -> None:
        """Begin a text.

        Args:
            engine: a loaded bundle.
            planner: plans the rounds and learns from them.
            prompt: token ids of the prompt, which prompt lookup copies from as well.
            rules: chooses the text's tokens; None if no rule does.
        """
        self._engine, self._planner, self._rules, self.lookup = engine, planner, rules, Lookup()
        self.lookup.extend(prompt)
        self._plan, self._at_hand = Plan(DRAFTER, 0), dict[str, Sequence[int]]()

    @property
    def source(self) -> str:
        """The source of the last round's drafts."""
        return self._plan.source

    def make(self, last: int, max_drafts: int) -> Sequence[int]:
        """Return the planned draft tokens after the newest token, without those that the rules forbid.

        Args:
            last: id of the newest token.
            max_drafts: the largest number of drafts.
        """
        self.lookup.extend([last])
        matching, copied = self.lookup.find(max_drafts)
        lookup_source = next((name for smallest, name in LOOKUP_SOURCES.items() if matching >= smallest), "")
        forced = self._rules.forced(max_drafts) if self._rules else []
        self._at_hand = {source: drafts for source, drafts in ((GRAMMAR, forced), (lookup_source, copied)) if drafts}
        lengths = {source: len(drafts) for source, drafts in self._at_hand.items()}
        self._plan = self._planner.plan({DRAFTER: max_drafts} | lengths)
        if self._plan.source != DRAFTER:
            return _allowed(self._rules, self._at_hand[self._plan.source][: self._plan.num_draft_tokens])
        return _allowed(self._rules, self._engine.draft(last, self._plan.num_draft_tokens))

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        """Learn from the outcome of a round.

        Args:
            done: the round.
            draft_seconds: time of making its drafts.
            verify_seconds: time of its verify pass.
        """
        planner, made, verified = self._planner, self._plan.num_draft_tokens, len(done.drafts)
        by_drafter = self._plan.source == DRAFTER
        # Draft steps were also taken for drafts that were cut off.
        steps_seconds = draft_seconds * verified / made if by_drafter and made else None
        planner.costs.record(verified, verify_seconds, steps_seconds)
        planner.record_loss(self._plan, len(done.tokens), verified)
        judged = min(verified + 1, made)  # the first that was cut off is known to be wrong
        planner.learn(DRAFTER, *((judged, done.accepted) if by_drafter else (0, 0)))
        for source, drafts in self._at_hand.items():
            if source == self._plan.source:
                planner.learn(source, judged, done.accepted)
            else:
                seen = min(len(done.tokens), len(drafts))
                right = common_prefix(drafts, done.tokens)
                planner.learn(source, min(right + 1, seen), right)
        self.lookup.extend(done.tokens[:-1])


def _allowed(rules: RuledChooser | None, drafts: Sequence[int]) -> Sequence[int]:
    """The drafts before the first that the rules forbid."""
    return drafts if rules is None else drafts[: rules.num_allowed(drafts)]
