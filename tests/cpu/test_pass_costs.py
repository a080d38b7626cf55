"""What cycles cost: estimates between measurements, against stalls and drift, and kept on disk."""

import json

import pytest

from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.pass_costs import PassCosts, cache_file
from orthrus_rt.policy import AR, REFRESH_CYCLES, candidate_plans
from tests.policy_simulator import cost_table

PLANS = candidate_plans(16)


def test_unmeasured_costs_lie_between_measured_ones():
    costs = PassCosts()
    costs.set(1, AR, 1.0)
    costs.set(1, CyclePlan("two_pass", 16), 4.0)
    assert costs.seconds(8, AR) == pytest.approx(1.0 + 7 / 15)
    beyond = CyclePlan("one_pass", 16, 3)
    assert costs.seconds(1, beyond) == pytest.approx(2.0 * (32 + 64) / (32 + 16))
    assert costs.seconds(1, beyond, hopeful=True) == pytest.approx(2.0)


def test_costs_follow_a_lasting_change_and_shrug_an_outlier_off():
    costs = PassCosts()
    costs.set(1, AR, 1.0)
    for _ in range(10):
        costs.observe(1, AR, 1.0)
    costs.observe(1, AR, 50.0)
    assert costs.seconds(1, AR) < 1.04
    for _ in range(60):
        costs.observe(1, AR, 2.0)
    assert costs.seconds(1, AR) == pytest.approx(2.0, rel=0.02)
    assert costs.drift(1, AR) < 0.1


def test_a_first_measurement_of_a_stalled_cycle_is_soon_forgotten():
    costs, plan, other = PassCosts(), CyclePlan("one_pass", 8, 8), CyclePlan("one_pass", 8, 4)
    costs.set(1, other, 1.0)
    costs.observe(1, plan, 5.0)
    assert costs.seconds(1, plan) == pytest.approx(5.0)
    assert costs.seconds(1, plan, hopeful=True) == pytest.approx(1.0)  # worth another attempt
    costs.observe(1, plan, 1.1)
    assert costs.seconds(1, plan) == pytest.approx(1.1) and costs.seconds(1, other) == pytest.approx(1.0)


def test_a_wrong_warm_up_is_corrected_within_a_few_cycles():
    costs = PassCosts()
    costs.set(1, AR, 1.3)
    for _ in range(REFRESH_CYCLES):
        costs.observe(1, AR, 1.0)
    assert costs.seconds(1, AR) < 1.15


def test_costs_are_kept_and_a_stale_or_broken_file_is_not_believed(tmp_path):
    costs = cost_table("steep", PLANS, 4)
    key = "cpu | model | 0.1.0"
    file = cache_file(tmp_path / "new" / "folder", key)
    costs.save(file, key)
    again = PassCosts()
    assert again.load(file, key)
    assert again.table() == [[*row[:-1], pytest.approx(row[-1])] for row in costs.table()]
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert cache_file(tmp_path, key) != cache_file(tmp_path, key + "1")
    text = file.read_text()
    broken = ["", text[: len(text) // 2], "[]", "{}", '{"key": 1}', json.dumps({"key": key, "seconds": []})]
    broken += [json.dumps({"key": key, "seconds": [[1, "ar", 1, 0, bad]]}) for bad in (0, -1, float("nan"), "x", None)]
    broken += [json.dumps({"key": key, "seconds": 7}), json.dumps({"key": key, "seconds": [[1, "ar"]]})]
    for content in broken:
        file.write_text(content)
        fresh = PassCosts()
        assert not fresh.load(file, key)
        assert len(fresh) == 0
    file.write_text(text)
    assert not PassCosts().load(file, "another key")
    assert not PassCosts().load(tmp_path / "missing", key)


def test_hope_is_for_what_was_measured_seldom():
    """A warm-up's time may be too high by some percent, and nobody would know: what has run often is known."""
    costs, plan = PassCosts(), CyclePlan("two_pass", 4)
    costs.set(1, plan, 2.0)
    assert 0.9 * 2.0 < costs.seconds(1, plan, hopeful=True) < 0.97 * 2.0 == pytest.approx(0.97 * costs.seconds(1, plan))
    for _ in range(20):
        costs.observe(1, plan, 2.0)
    assert costs.seconds(1, plan, hopeful=True) == pytest.approx(costs.seconds(1, plan))
