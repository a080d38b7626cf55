"""What cycles cost: estimates between measurements, resistance to stalls and drift, and storage on disk."""

import dataclasses
import json
import math
import random

import pytest
import torch

from orthrus_rt.auto import cost_identity
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.lane import REFRESH_CYCLES
from orthrus_rt.pass_costs import APART, PassCosts, cache_file
from orthrus_rt.policy import AR, candidate_plans
from tests.checkpoints import tiny_config
from tests.policy_simulator import cost_table

PLANS = candidate_plans(16)
TRIED = CyclePlan("two_pass", 4)


def test_unmeasured_costs_lie_between_measured_ones():
    costs = PassCosts()
    costs.set(1, AR, 1.0)
    costs.set(1, CyclePlan("two_pass", 16), 4.0)
    assert costs.seconds(8, AR) == pytest.approx(1.0 + 7 / 15)
    beyond = CyclePlan("one_pass", 16, 3)
    assert costs.seconds(1, beyond) == pytest.approx(2.0 * (32 + 64) / (32 + 16))
    assert costs.seconds(1, beyond, hopeful=True) == pytest.approx(2.0)
    costs = PassCosts()
    costs.set(8, AR, 1.0)
    for hopeful in (False, True):
        assert costs.seconds(1, AR, hopeful) == pytest.approx((32 + 1) / (32 + 8))  # fewer rows


def test_what_is_guessed_follows_what_cycles_are_found_to_cost():
    """Whether or not the guess was asked for before."""
    near, far = CyclePlan("two_pass", 4), CyclePlan("two_pass", 16)
    asked, first = PassCosts(), PassCosts()
    for costs in (asked, first):
        costs.set(1, AR, 1.0)
        costs.set(1, near, 2.0)
    before = asked.seconds(1, far)
    for costs in (asked, first):
        for _ in range(10):
            costs.observe(1, near, 3.0)
            costs.observe(1, AR, 1.0)
    assert asked.seconds(1, far) == first.seconds(1, far) > 1.2 * before


def known(count=30, *plans) -> PassCosts:
    """1 second for each plan, and for AR from ``count`` cycles."""
    costs = PassCosts()
    for plan in (AR, *plans):
        costs.set(1, plan, 1.0)
    for _ in range(count):
        costs.observe(1, AR, 1.0)
    return costs


def test_costs_follow_a_lasting_change_and_shrug_an_outlier_off():
    costs = known()
    costs.observe(1, AR, 50.0)
    assert costs.seconds(1, AR) < 1.1
    for _ in range(8):
        costs.observe(1, AR, 1.0)
    assert costs.seconds(1, AR) == pytest.approx(1.0, rel=0.02)
    for _ in range(20):
        costs.observe(1, AR, 2.0)
    assert costs.seconds(1, AR) == pytest.approx(2.0, rel=0.02)


def test_cycles_that_are_not_timed_pass_too():
    """Those with prompts."""
    costs = known(1)
    for _ in range(2):
        costs.observe(1, TRIED, 2.0)
        assert costs.measured_briefly(1, TRIED)
    costs.pass_by(APART)
    costs.observe(1, TRIED, 2.0)
    assert not costs.measured_briefly(1, TRIED)


@pytest.mark.parametrize(("late", "then", "found"), [(0.8, (8.0, 0.8), 0.8), (0.3, (2.0, 2.0, 2.0), 2.0)])
def test_a_late_time_that_contradicts_brief_ones_is_confirmed_in_turn(late, then, found):
    """The next one may be of a stalled cycle; or the late one was wrong."""
    costs = known(1)
    for _ in range(2):
        costs.observe(1, TRIED, 2.0)
    costs.pass_by(APART)
    costs.observe(1, TRIED, late)
    assert costs.seconds(1, TRIED) == pytest.approx(late) and costs.measured_once(1, TRIED)
    for seconds in then:
        costs.observe(1, TRIED, seconds)
    assert costs.seconds(1, TRIED) == pytest.approx(found) and not costs.measured_once(1, TRIED)


def test_times_without_a_gap_contradict_nothing():
    """Although the first was long before."""
    costs = known(1)
    for seconds in [2.0] * APART + [1.4]:
        costs.observe(1, TRIED, seconds)
        assert costs.seconds(1, TRIED) > 1.7


def test_a_change_of_what_is_well_known_is_the_machines_and_changes_the_others_too():
    idle = CyclePlan("two_pass", 4)
    costs = known(30, idle)
    for seconds in (2.0, 1.0):
        for _ in range(30):
            costs.observe(1, AR, seconds)
        assert costs.seconds(1, idle) == pytest.approx(seconds, rel=0.05)
    assert costs.drift(1, idle) < 0.05


@pytest.mark.parametrize("machine", [2.0, 0.5])
def test_what_was_taken_for_a_plans_own_turns_out_to_be_the_machines(machine):
    """The machine changes just when another plan is tried: the next times of the plan in use show which changed."""
    tried = CyclePlan("two_pass", 4)
    costs = known(500, tried)
    for _ in range(8):
        costs.observe(1, tried, machine)
    assert costs.seconds(1, tried) == pytest.approx(machine, rel=0.1)
    alike = costs.seconds(1, tried) / costs.seconds(1, AR)
    for _ in range(3):
        costs.observe(1, AR, machine)
    assert abs(math.log(costs.seconds(1, tried) / costs.seconds(1, AR))) < 0.75 * abs(math.log(alike))


def test_what_was_taken_for_the_machines_turns_out_to_be_a_plans_own():
    used = CyclePlan("two_pass", 4)
    costs = known(30, used)
    for _ in range(30):
        costs.observe(1, used, 1.0)
    for _ in range(30):
        costs.observe(1, used, 2.0)
    assert costs.seconds(1, AR) > 1.5 and costs.drift(1, AR) > 0.25
    for _ in range(4):
        for _ in range(REFRESH_CYCLES):
            costs.observe(1, AR, 1.0)
        costs.observe(1, used, 2.0)
    assert costs.seconds(1, used) / costs.seconds(1, AR) > 1.5


def test_no_correlation_is_believed_that_cannot_be():
    """The machine and single plans change at the same time, and by more than the filter assumes."""
    rng, plans, most = random.Random(0), [AR, CyclePlan("two_pass", 4), CyclePlan("one_pass", 16, 8)], 0.0
    costs, own, machine, plan = known(0, *plans[1:]), dict.fromkeys(plans, 1.0), 1.0, AR
    for _ in range(1500):
        plan = rng.choice(plans) if rng.random() < 0.05 else plan
        machine = rng.choice((0.3, 1.0, 3.0)) if rng.random() < 0.01 else machine
        own[plan] = rng.choice((0.3, 1.0, 3.0)) if rng.random() < 0.01 else own[plan]
        costs.observe(1, plan, machine * own[plan] * math.exp(rng.gauss(0, 0.1)))
        for key, covariance in costs._covariance.items():
            most = max(most, covariance**2 / (costs._variance[key] * costs._slowness_variance))
    assert 0.9 < most < 1.0


def test_a_new_warm_up_leaves_nothing_open_between_a_plan_and_the_machine():
    tried, other = CyclePlan("two_pass", 4), CyclePlan("two_pass", 8)
    costs = known(500, tried, other)
    for _ in range(8):
        costs.observe(1, tried, 3.0)
    for plan in (tried, other):
        costs.set(1, plan, 3.0)
    for _ in range(3):
        costs.observe(1, AR, 3.0)
    assert costs.seconds(1, tried) == pytest.approx(costs.seconds(1, other))


def test_a_first_measurement_of_a_stalled_cycle_is_soon_forgotten():
    costs, plan, other = PassCosts(), CyclePlan("one_pass", 8, 8), CyclePlan("one_pass", 8, 4)
    costs.set(1, other, 1.0)
    costs.observe(1, plan, 5.0)
    assert costs.seconds(1, plan) == pytest.approx(5.0)
    assert costs.seconds(1, plan, hopeful=True) == pytest.approx(1.0)  # worth another attempt
    costs.observe(1, plan, 1.1)
    assert costs.seconds(1, plan) == pytest.approx(1.1) and costs.seconds(1, other) == pytest.approx(1.0)


def test_what_no_second_cycle_confirmed_is_not_kept(tmp_path):
    costs = known(3)
    costs.observe(1, CyclePlan("two_pass", 4), 5.0)
    assert [row[1] for row in costs.table()] == ["ar"]
    costs.observe(1, CyclePlan("two_pass", 4), 2.0)
    costs.observe(1, CyclePlan("two_pass", 4), 2.0)
    assert [row[1] for row in costs.table()] == ["ar", "two_pass"]
    for no_time in (0.0, -1.0, math.nan, math.inf):
        costs.observe(1, AR, no_time)
    assert costs.seconds(1, AR) == pytest.approx(1.0, rel=0.02)


def test_two_stalls_in_a_row_are_forgotten_too_and_the_worst_is_not_believed():
    costs, plan = PassCosts(), CyclePlan("two_pass", 4)
    costs.set(1, AR, 1.0)
    for seconds, most in ((1000.0, 20.0), (9.0, 9.0), (2.0, 2.0), (2.0, 2.0)):
        costs.observe(1, plan, seconds)
        assert costs.seconds(1, plan) <= 1.01 * most


def test_two_cycles_that_agree_settle_it_whatever_the_first_one_said():
    costs, plan = PassCosts(), CyclePlan("two_pass", 4)
    costs.set(1, AR, 1.0)
    for seconds, once in ((1000.0, True), (9.0, True), (10.0, False)):
        costs.observe(1, plan, seconds)
        assert costs.measured_once(1, plan) == once
    assert costs.seconds(1, plan) < 9.9  # between the two times


def test_a_second_time_that_is_a_little_shorter_settles_it_too():
    costs, plan = known(0), CyclePlan("two_pass", 4)
    for seconds in (2.2, 2.0):
        costs.observe(1, plan, seconds)
    assert not costs.measured_once(1, plan) and 2.0 < costs.seconds(1, plan) < 2.2


def test_a_warm_up_is_taken_at_its_word_on_a_machine_that_has_slowed_down():
    costs, plan = known(30), CyclePlan("two_pass", 4)
    for _ in range(30):
        costs.observe(1, AR, 2.0)
    costs.set(1, plan, 3.0)
    assert costs.seconds(1, plan) == pytest.approx(3.0)


def test_no_more_is_hoped_for_than_what_was_measured_allows():
    """A warm-up found it dear, or one cycle was cheaper than its like."""
    costs, plan, other = PassCosts(), CyclePlan("one_pass", 8, 8), CyclePlan("one_pass", 8, 4)
    costs.set(1, other, 1.0)
    costs.set(1, plan, 5.0)
    assert costs.seconds(1, plan, hopeful=True) > 4.9
    costs = PassCosts()
    costs.set(1, other, 1.0)
    costs.observe(1, plan, 0.5)
    assert costs.seconds(1, plan, hopeful=True) <= 0.5


def test_a_warm_up_settles_what_was_measured_once():
    costs, plan = known(0), CyclePlan("two_pass", 4)
    costs.observe(1, plan, 5.0)
    costs.set(1, plan, 2.0)
    assert not costs.measured_once(1, plan) and [row[1] for row in costs.table()] == ["ar", "two_pass"]
    costs.observe(1, plan, 1.0)
    assert costs.seconds(1, plan) > 1.2  # it is not replaced as a stall would be


@pytest.mark.parametrize("machine", [2.0, 0.5])
def test_drift_is_of_a_machine_that_slowed_down_or_became_faster(machine):
    used = CyclePlan("two_pass", 4)
    costs = known(30, used)
    for _ in range(60):
        costs.observe(1, used, 1.0)
    assert costs.drift(1, AR) < 0.1 and costs.drift(8, AR) == 0.0
    for _ in range(30):
        costs.observe(1, used, machine)
    assert costs.drift(1, AR) > 0.25


def test_a_stall_is_not_believed_however_long_ago_the_plan_ran():
    plan = CyclePlan("two_pass", 4)
    costs = known(30, plan)
    costs._clock += 10**7  # cycles of other plans
    costs.observe(1, plan, 50.0)
    assert costs.seconds(1, plan) < 1.7


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2, 0.4, "skew"])
def test_noise_moves_no_plan_that_does_not_run(noise):
    """20,000 cycles of AR on a machine that does not change."""
    rng, idle = random.Random(0), CyclePlan("two_pass", 8)
    costs = known(0, idle)
    for cycle in range(20_000):
        costs.observe(1, AR, 1 + rng.expovariate(10) if noise == "skew" else math.exp(rng.gauss(0, noise)))
        if cycle % 100 == 99:
            assert 0.5 < costs.seconds(1, idle) < 2.0


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
    broken += [
        json.dumps({"key": key, "seconds": [[1, "ar", 1, 0, bad]]}) for bad in (0, -1, 1e-9, 1e300, math.nan, "x", None)
    ]
    broken += [
        json.dumps({"key": key, "seconds": [[1, "ar", 1, 0, 1], bad]})
        for bad in ([1, "foo", 1, 0, 1], [0, "ar", 1, 0, 1], [float("inf"), "ar", 1, 0, 1])
    ]
    broken += ["[" * 100_000, f'{{"key": "{key}", "seconds": [[1, "ar", 1, 0, {10**400}]]}}']
    broken += [json.dumps({"key": key, "seconds": 7}), json.dumps({"key": key, "seconds": [[1, "ar"]]})]
    for content in broken:
        file.write_text(content)
        fresh = PassCosts()
        assert not fresh.load(file, key)
        assert len(fresh) == 0
    file.write_text(text)
    assert not PassCosts().load(file, "another key")
    assert not PassCosts().load(tmp_path / "missing", key)


def test_hope_is_for_what_was_measured_seldom_or_long_ago():
    """A warm-up's time may be some percent too high without anyone noticing. The cost of what runs often is known."""
    plan = CyclePlan("two_pass", 4)
    costs = known(0, plan)

    def hope():
        return 1 - costs.seconds(1, plan, hopeful=True) / costs.seconds(1, plan)

    at_first = hope()
    assert 0.005 < at_first < 0.03
    for _ in range(20):
        costs.observe(1, plan, 1.0)
        costs.observe(1, AR, 1.0)
    assert hope() < 0.6 * at_first
    for _ in range(2000):
        costs.observe(1, AR, 1.0)
    assert hope() == pytest.approx(at_first)


def test_unmeasured_costs_are_in_proportion_to_those_of_like_cycles():
    basis, plan = known(0, CyclePlan("two_pass", 4)), CyclePlan("two_pass", 4)
    costs = basis.of_like_cycles()
    assert not costs and costs.seconds(1, plan) == pytest.approx(1.0)
    costs.observe(1, AR, 1.5)
    assert costs.seconds(1, plan) == pytest.approx(1.5)
    assert costs.seconds(8, plan) > 2.0  # nothing to derive the proportion from
    costs.set(2, AR, 1.0)
    costs.set(2, CyclePlan("two_pass", 16), 4.0)
    assert costs.seconds(2, plan) == pytest.approx(2 * (1 + 6 / 30))  # greedy cycles of two sequences: AR was not timed
    costs.observe(1, plan, 2.0)
    assert costs.seconds(1, plan) == pytest.approx(2.0) and basis.seconds(1, plan) == pytest.approx(1.0)


def test_costs_that_could_not_be_kept_leave_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("orthrus_rt.pass_costs.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        cost_table("steep", PLANS, 4).save(tmp_path / "costs.json", "key")
    assert not list(tmp_path.iterdir())


def test_what_costs_are_kept_for(monkeypatch):
    """Whatever changes them: the model's name and sizes, how it is stored, device, implementations, context."""

    def identity(dtype=torch.float32, nbytes=100, context=256, **sizes):
        config = dataclasses.replace(tiny_config(), **sizes)
        return cost_identity(config, torch.device("cpu"), dtype, {"ar": nbytes}, context)

    sizes = {"name": "other", "num_layers": 3, "hidden_size": 80, "intermediate_size": 144, "vocab_size": 97}
    others = sizes | {"dtype": torch.bfloat16, "nbytes": 99, "context": 255}
    seen = [identity(), *(identity(**{name: other}) for name, other in others.items())]
    for name, other in {"device_facts": {"isa": "another"}, "dispatch.select": "another"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"orthrus_rt.auto.{name}", lambda *_, other=other: other)
            seen.append(identity())
    assert len(set(seen)) == len(seen)
