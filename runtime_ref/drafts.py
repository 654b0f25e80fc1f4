"""Where the drafts of a text come from: the drafter, or the text itself."""

from collections.abc import Sequence

from runtime_ref.acceptance import Round, common_prefix
from runtime_ref.costs import DRAFTER
from runtime_ref.draft_length import DraftLength, Plan
from runtime_ref.engine import Engine
from runtime_ref.lookup import Lookup

# Look-ups by how many tokens agree: the more, the likelier what follows agrees too, so each has its own estimate.
AGREEING = {9: "lookup of 9 or more", 5: "lookup of 5 to 8", 3: "lookup of 3 or 4", 2: "lookup of 2"}


class FixedDrafts:
    """The same number of drafts each round, from the drafter."""

    def __init__(self, engine: Engine, num_draft_tokens: int) -> None:
        self._engine, self._num_draft_tokens = engine, num_draft_tokens
        self.source = DRAFTER

    def make(self, last: int, most: int) -> Sequence[int]:
        """At most so many drafts after `last`."""
        return self._engine.draft(last, min(self._num_draft_tokens, most))

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        """Nothing."""


class PlannedDrafts:
    """As many as `DraftLength` plans, from the drafter or from where the newest tokens stood before.

    What a look-up would have been worth shows in each round, whoever made its drafts.
    """

    def __init__(self, engine: Engine, length: DraftLength, prompt: Sequence[int]) -> None:
        self._engine, self._length, self.lookup = engine, length, Lookup()
        self.lookup.extend(prompt)
        self._plan, self._found, self._kind = Plan(DRAFTER, 0), list[int](), ""

    @property
    def source(self) -> str:
        """Who made the drafts of the last round."""
        return self._plan.source

    def make(self, last: int, most: int) -> Sequence[int]:
        """At most so many drafts after `last`."""
        self.lookup.extend([last])
        agreeing, self._found = self.lookup.find(most)
        self._kind = next((name for least, name in AGREEING.items() if agreeing >= least), "")
        self._plan = self._length.plan({DRAFTER: most} | ({self._kind: most} if self._found else {}))
        if self._plan.source != DRAFTER:
            return self._found[: self._plan.num_draft_tokens]
        return self._engine.draft(last, self._plan.num_draft_tokens)

    def learn(self, done: Round, draft_seconds: float, verify_seconds: float) -> None:
        """Count what the round did and took."""
        length, drafted, own = self._length, len(done.drafts), self._plan.source == DRAFTER
        length.costs.measured(drafted, verify_seconds, draft_seconds if own else None)
        length.pay(self._plan, len(done.tokens))
        length.learn(DRAFTER, *((drafted, done.accepted) if own else (0, 0)))
        if not own:
            length.learn(self._plan.source, drafted, done.accepted)
        elif self._found:
            seen = min(len(done.tokens), len(self._found))
            right = common_prefix(self._found, done.tokens)
            length.learn(self._kind, min(right + 1, seen), right)
        self.lookup.extend(done.tokens[:-1])
