"""What a policy reports about itself, which ``Engine.explain`` returns."""

import json

import pytest

from orthrus_rt.acceptance import Outcome
from orthrus_rt.cycle_plan import AR, CyclePlan
from orthrus_rt.policy import SAFETY, Policy
from tests.cpu.test_policy import policy, run
from tests.policy_simulator import PLANS, cycle_seconds


def test_what_it_explains_is_plain_data():
    chooser = policy("steep")
    run("steep", lambda cycle, i: (0.8, 1.0), 300, chooser=chooser)
    chooser.settle()
    facts = json.loads(json.dumps(chooser.explain(batch_size=3)))
    assert facts["bucket"] == 4
    assert set(facts["candidates"]) == {p.label for p in PLANS}
    assert facts["candidates"]["ar"]["seconds_per_token"] == pytest.approx(cycle_seconds("steep", 4, AR) / 3)
    assert facts["spent_seconds"] <= (1 + SAFETY) * facts["ar_equivalent_seconds"]
    assert facts["current"] in facts["candidates"]


def test_what_it_explains_of_a_plan_is_of_that_batch_and_of_one_sequence():
    plan, rival = CyclePlan("two_pass", 4), CyclePlan("one_pass", 4, 2)
    chooser = Policy([AR, plan, rival], 4)
    chooser.costs.set(4, AR, 1.0)
    chooser.costs.set(4, plan, 1.5)
    for _ in range(40):
        ran = chooser.choose(3)
        chooser.record([Outcome(ran.block_len - 1, ran.block_len - 1)] * 3, 1.5 if ran == plan else 1.0)
    chooser.settle()
    chooser.prefilled(7.0)
    facts, expected = chooser.explain(batch_size=3), chooser.acceptance.tokens([AR, plan, rival])
    for p in (AR, plan, rival):
        row, seconds = facts["candidates"][p.label], chooser.costs.seconds(4, p)
        assert (row["seconds_per_cycle"], row["tokens_per_cycle"]) == (seconds, expected[p])
        assert row["seconds_per_token"] == pytest.approx(seconds / expected[p] / 3)
    assert expected[plan] > 3.0
    assert [row["cost_measured"] for row in facts["candidates"].values()] == [True, True, False]
    assert list(facts["accepted"]) == ["two_pass", "one_pass x2"] and facts["accepted"]["two_pass"][3] > 2.0
    assert facts["safety_balance_seconds"] == chooser.safety.balance
    assert facts["exploration_balance_seconds"] == chooser.exploration.balance != chooser.safety.balance
    assert (facts["spent_seconds"], facts["ar_equivalent_seconds"]) == (chooser.spent, chooser.ar_equivalent)
    assert facts["spent_seconds"] < 0.7 * facts["ar_equivalent_seconds"]


def test_it_explains_what_it_wants_where_the_account_does_not_cover_that():
    chooser = policy("steep")
    run("steep", lambda cycle, i: (0.9, 1.0), 300, chooser=chooser)
    chooser.settle()
    wanted, chooser.current = chooser.current, None  # no course is under way
    chooser.safety.balance = 0.0
    assert chooser.choose(1) == AR != wanted
    facts = chooser.explain()
    assert (facts["in_use"], facts["current"]) == (wanted.label, "ar")


def test_it_explains_itself_before_it_has_chosen():
    facts = policy("steep", measured=False).explain()
    assert facts["in_use"] is facts["current"] is None and facts["spent_seconds"] == 0.0
    assert not any(row["cost_measured"] or row["cycles"] for row in facts["candidates"].values())
