"""Planned numbers of drafts, on the simulated texts of exporter/studies/simulation.py, whose acceptance is known."""

import random
from collections.abc import Callable

import pytest

from exporter.studies.simulation import (
    COSTS,
    MAX_DRAFT_TOKENS,
    CostTable,
    Texts,
    Trace,
    TraceEngine,
    fixed,
    planned,
    recorded_texts,
    rule_of_thumb,
    simulate,
    steady,
    synthetic,
    synthetic_texts,
    transformers_heuristic,
)
from runtime_ref.acceptance import Round
from runtime_ref.costs import DRAFTER, Costs
from runtime_ref.draft_length import (
    INITIAL_LOSS_PASSES,
    LOSS_PASSES_PER_TOKEN,
    AcceptanceEstimate,
    DraftLength,
    Plan,
)
from runtime_ref.lookup import Lookup

pytestmark = pytest.mark.xdist_group("draft length")  # in one process, which keeps the rates
SYNTHETIC = {texts.name: texts for texts in synthetic_texts(seed=1)}
RECORDED = {texts.name: texts for texts in recorded_texts()}
USEFUL = [name for name in COSTS if name != "each token a full pass"]


RATES: dict[tuple[int, str], float] = {}


def planned_rate(texts: Texts, costs: str) -> float:
    """The rate with planned numbers of drafts, which several tests compare."""
    if (id(texts), costs) not in RATES:
        RATES[id(texts), costs] = rate(texts, COSTS[costs], planned(COSTS[costs]))
    return RATES[id(texts), costs]


def rate(texts: Texts, table: CostTable, choose: Callable) -> float:
    """Tokens a second, relative to plain decoding."""
    time, tokens = simulate(texts, table, choose)
    return tokens / time


def best_fixed(texts: Texts, table: CostTable) -> float:
    return max(rate(texts, table, fixed(drafts)) for drafts in range(MAX_DRAFT_TOKENS + 1))


def of_category(category: str) -> list[str]:
    return [name for name, texts in SYNTHETIC.items() if texts.category == category]


@pytest.mark.parametrize("costs", COSTS)
def test_steady_text_is_nearly_as_fast_as_the_best_fixed_number(costs: str) -> None:
    ratios = {
        name: planned_rate(SYNTHETIC[name], costs) / best_fixed(SYNTHETIC[name], COSTS[costs])
        for name in of_category("steady")
    }
    assert min(ratios.values()) >= 0.93, ratios
    assert sum(ratios.values()) / len(ratios) >= 0.97


@pytest.mark.parametrize("name", of_category("changing"))
def test_changing_text_is_faster_than_with_any_fixed_number(name: str) -> None:
    gains = [planned_rate(SYNTHETIC[name], c) / best_fixed(SYNTHETIC[name], COSTS[c]) for c in USEFUL]
    assert min(gains) > 1
    assert max(gains) > 1.05


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("known", [True, False], ids=["known", "measured"])
def test_text_that_is_never_accepted_costs_two_percent_at_most(costs: str, known: bool) -> None:
    for length in (202, 1200):
        never = Texts("never", "never", [synthetic(steady(0.0), 0, length)])
        assert 0.98 <= rate(never, COSTS[costs], planned(COSTS[costs], known)) <= 1


@pytest.mark.parametrize("costs", COSTS)
def test_an_adversary_gains_no_more(costs: str) -> None:
    """Single drafts are right, so that the estimate rises; drafts are wrong whenever several are proposed."""

    class Adversary(TraceEngine):
        def draft(self, last: int, num_draft_tokens: int) -> list[int]:
            few = num_draft_tokens <= 1 and self.position % 3
            right = list(self.trace.tokens[self.position + 1 :][:num_draft_tokens])
            return right if few else [-1] * num_draft_tokens

    table, texts = COSTS[costs], Texts("", "", [synthetic(steady(0.0), 0, 800)])
    choose = planned(table)
    drafts, total = choose(engine := Adversary(texts.texts[0])), 0.0
    while engine.position < 790:
        proposed = drafts.make(engine.trace.tokens[engine.position], MAX_DRAFT_TOKENS)
        done = engine.verify(proposed)
        drafts.learn(done, len(proposed) * table.step, table.passes[len(proposed)])
        total += table.passes[len(proposed)] + len(proposed) * table.step
    assert (engine.position - 1) / total >= 0.98


def test_other_rules_lose_where_this_does_not() -> None:
    everything, others = [*SYNTHETIC.values(), *RECORDED.values()], (transformers_heuristic, rule_of_thumb(6))
    for costs, table in COSTS.items():
        planned_rates = [planned_rate(texts, costs) for texts in everything]
        other_rates = [[rate(texts, table, other) for texts in everything] for other in others]
        assert min(planned_rates) >= 0.98
        assert sum(planned_rates) > max(map(sum, other_rates))
    assert max(map(min, other_rates)) < 0.6


@pytest.mark.parametrize("costs", USEFUL)
def test_costs_are_measured_on_the_way(costs: str) -> None:
    """On long texts, little is lost by measuring the costs first."""
    for name in ("90%", "90/10 % by 300"):
        measured = rate(SYNTHETIC[name], COSTS[costs], planned(COSTS[costs], costs_known=False))
        assert measured > 0.93 * planned_rate(SYNTHETIC[name], costs)


@pytest.mark.parametrize("costs", USEFUL)
def test_prompt_lookup_helps(costs: str) -> None:
    """It is much faster on copied passages, and loses nothing on texts of the built-in pair."""
    for name, min_ratio in (("copied passages", 1.4), ("greedy", 0.99), ("sampled", 0.99)):
        without = rate(RECORDED[name], COSTS[costs], planned(COSTS[costs], prompt_lookup=False))
        assert planned_rate(RECORDED[name], costs) > min_ratio * without


def test_drafting_is_tried_again() -> None:
    """Drafts that are right after a long stretch of wrong ones are noticed."""
    text = Texts("", "", [Trace(range(1600), [0] * 800 + [MAX_DRAFT_TOKENS] * 800)])
    assert rate(text, COSTS["like a GPU"], planned(COSTS["like a GPU"])) > 1.5


def test_acceptance_follows_what_it_sees() -> None:
    estimate, generator = AcceptanceEstimate(4), random.Random(0)
    for _ in range(400):
        accepted = next((i for i in range(4) if generator.random() > 0.6), 4)
        estimate.update(4, accepted)
    for position, reached in enumerate(estimate.reached):
        assert reached == pytest.approx(0.6**position, abs=0.12)
    before = estimate.reached[1]
    for _ in range(900):
        estimate.update(0, 0)
    assert before < estimate.reached[1] == pytest.approx(0.9, abs=0.01)


class TestCosts:
    def measured(self) -> Costs:
        costs = Costs(8)
        for drafts, seconds in ((0, 0.1), (4, 0.2), (8, 0.24)):
            costs.record(drafts, seconds, 0.01 * drafts)
        return costs

    def test_times_are_interpolated(self) -> None:
        costs = self.measured()
        assert costs.relative("", 2) == pytest.approx(1.5)
        assert costs.relative(DRAFTER, 2) == pytest.approx(1.7)
        assert costs.relative("", 6) == pytest.approx(2.2)

    def test_accidents_do_not_count(self) -> None:
        costs = self.measured()
        for _ in range(4):
            costs.record(4, 0.9, 0.4)
        assert costs.relative(DRAFTER, 4) == pytest.approx(2.4)
        costs.record(4, 0.9, 0.4)  # five in a row are no accident, but a longer pass is still cheaper
        assert costs.relative("", 4) == pytest.approx(2.4)

    def test_sizes_are_measured_in_rising_order(self) -> None:
        costs, order = Costs(8, row_multiple=2), []
        while (drafts := costs.next_to_measure(8)) is not None:
            order.append(drafts)
            costs.record(drafts, 0.1, 0.01)
        assert order == [0, 0, 2, 2, 4, 4, 8, 8]
        assert Costs(8).next_to_measure(0) == 0
        assert Costs(0).next_to_measure(0) == 0


def test_lookup_copies_what_followed() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 9, 2, 3])
    assert lookup.find(3) == (2, [4, 5, 9])
    lookup.extend([4])
    assert lookup.find(2) == (3, [5, 9])
    lookup.extend([7])
    assert lookup.find(2) == (0, [])


def test_lookup_continues_a_repetition() -> None:
    lookup = Lookup()
    lookup.extend([8, 1, 2, 1, 2, 1, 2])
    assert lookup.find(5) == (4, [1, 2, 1, 2, 1])


def test_a_plan_never_exceeds_the_available_drafts() -> None:
    planner = DraftLength(8, Costs(8))
    for drafts in range(9):
        planner.costs.record(drafts, 1.0, 0.0)
        planner.costs.record(drafts, 1.0, 0.0)
    for available in range(9):
        assert planner.plan({DRAFTER: available}).num_draft_tokens == available


def test_a_round_whose_drafts_were_cut_costs_its_steps_and_its_shorter_pass() -> None:
    """Of four drafts, rules forbid the last two: a plain pass takes 1 s, each draft in it 0.1 s, a draft step 0.2 s."""
    planner = DraftLength(8, Costs(8))
    for drafts in range(9):
        planner.costs.record(drafts, 1 + 0.1 * drafts, 0.2 * drafts)
    planner.record_loss(Plan(DRAFTER, 4), tokens=3, verified=2)
    expected = -INITIAL_LOSS_PASSES + (1.2 + 4 * 0.2) - 3 * (1 + LOSS_PASSES_PER_TOKEN)
    assert planner.as_dict()["loss_passes"] == pytest.approx(expected)


def test_what_was_learned_in_a_round_that_took_minutes_can_be_restored() -> None:
    """A process may be stopped in the middle of a round."""
    costs = Costs(8)
    costs.record(0, 0.0003)
    costs.record(0, 0.0003)
    costs.record(1, 400.0, 0.0001)
    planner = DraftLength(8, costs)
    planner.record_loss(Plan(DRAFTER, 1), 1, 1)
    restored = DraftLength(8, costs)
    restored.restore(planner.as_dict())
    assert restored.as_dict() == planner.as_dict()


def test_rounds_are_cut() -> None:
    done = Round([5, 6, 7], 3, [5, 6, 7, 8], [-0.1, -0.2, -0.3, -0.4])
    assert done.cut(2) == Round([5, 6, 7], 2, [5, 6], [-0.1, -0.2])
    assert done.cut(4) == done
