"""What outcomes teach about the plans that did not run: orthrus_rt/acceptance.py."""

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from orthrus_rt import acceptance
from orthrus_rt.acceptance import IDLE_MEMORY, SLOW_MEMORY, Acceptance, Outcome, Ratio, prior_quality
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.policy import AR, candidate_plans
from tests.policy_simulator import Sequence

PLANS = candidate_plans(16)
FAN_OUTS = sorted({p.fan_out for p in PLANS})


def test_censored_observations_say_nothing_beyond_them():
    """Cycles that accepted all of 3 drafts raise the hazards of 3 positions; the fourth inherits from the third."""
    plan = CyclePlan("two_pass", 4)
    short, long = Acceptance(15, FAN_OUTS), Acceptance(15, FAN_OUTS)
    for _ in range(200):
        short.observe(plan, [[Outcome(3, 3)]])
        long.observe(CyclePlan("two_pass", 16), [[Outcome(15, 3)]])
    survival = [b - a for a, b in itertools.pairwise(short.accepted()[0])]
    assert survival[2] > 0.9
    assert survival[3] / survival[2] == pytest.approx(survival[2] / survival[1], rel=1e-2)
    assert short.accepted()[0][:4] == pytest.approx(long.accepted()[0][:4])
    assert long.accepted()[0][15] < 3.1


WITHOUT_MEMORY = """
import resource
from orthrus_rt.acceptance import Acceptance, Outcome
from orthrus_rt.policy import candidate_plans

plans = candidate_plans(16)
taught = Acceptance(15, {plan.fan_out for plan in plans})
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.RLIM_INFINITY))
for plan in plans:
    taught.observe(plan, [[Outcome(3, 2)]])
print(taught.tokens(plans)[plans[-1]] > 1)
"""


def test_no_memory_for_a_blas():
    """NumPy's first matrix product maps a buffer, and ends the process if it gets none."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


def test_observing_one_mode_informs_the_other():
    fresh, taught = Acceptance(15, FAN_OUTS), Acceptance(15, FAN_OUTS)
    rng = random.Random(3)
    for _ in range(300):
        accepted = next((i for i in range(15) if rng.random() > 0.9), 15)
        taught.observe(CyclePlan("two_pass", 16), [[Outcome(15, accepted)]])
    plan = CyclePlan("one_pass", 16, 8)
    assert taught.tokens([plan])[plan] > 1.5 * fresh.tokens([plan])[plan]


@pytest.mark.parametrize("plan", [AR, CyclePlan("two_pass", 16), CyclePlan("one_pass", 16, 4)])
def test_cycles_in_a_row_may_be_told_together(plan):
    """The only difference is what the later ones of 8 cycles would have forgotten of the earlier ones, in 128."""
    rng = random.Random(11)
    one_by_one, together = Acceptance(15, FAN_OUTS), Acceptance(15, FAN_OUTS)

    def outcomes(count):
        if plan == AR:
            return [Outcome(0, 0, False, rng.random() < 0.1) for _ in range(count)]
        ends = [out._replace(cut=rng.random() < 0.1) for out in drawn(rng, (1, 1, 1), count)]
        return [Outcome(0, 0, fresh=True) if rng.random() < 0.1 else out for out in ends]

    for seen in (one_by_one, together):
        seen.observe(CyclePlan("two_pass", 16), [[Outcome(15, 15)] * 3])
        seen.observe(CyclePlan("one_pass", 16, 8), [[Outcome(15, 10)] * 3])
    for _ in range(1200):
        cycles = [outcomes(rng.randint(1, 4)) for _ in range(8)]
        together.observe(plan, cycles)
        for outs in cycles:
            one_by_one.observe(plan, [outs])
    assert together.tokens(PLANS) == pytest.approx(one_by_one.tokens(PLANS), rel=0.03)
    hope, hope_apart = (seen.tokens(PLANS, 1.0) for seen in (together, one_by_one))
    assert hope == pytest.approx(hope_apart, rel=0.03)
    for ratio, apart in ((together._level, one_by_one._level), (together._shape, one_by_one._shape)):
        assert ratio._expected == pytest.approx(apart._expected, rel=0.1, abs=1e-3)


def test_a_large_batch_forgets_as_fast_as_a_small_one():
    """It forgets by cycles, not by drafts."""
    for batch in (1, 16):
        seen = Acceptance(15, FAN_OUTS)
        for accepted, count in ((15, 512), (0, 64)):
            for _ in range(count):
                seen.observe(CyclePlan("two_pass", 16), [[Outcome(15, accepted)] * batch])
        assert seen.accepted()[0][1] == pytest.approx((1 - 1 / 128) ** 64, abs=0.05)


def test_a_fan_out_hears_of_the_others():
    seen, fresh = (Acceptance(15, FAN_OUTS) for _ in range(2))
    for _ in range(50):
        seen.observe(CyclePlan("one_pass", 16, 4), [[Outcome(15, 9)] * 8])
    for fan_out in (2, 8):
        assert seen.accepted()[fan_out][9] > 2 * fresh.accepted()[fan_out][9]


def test_fan_outs_are_told_apart():
    """The same text under both, alternating: the wider one's drafts are accepted more often, whatever was assumed."""
    seen, narrow, wide = Acceptance(15, FAN_OUTS), CyclePlan("one_pass", 16, 2), CyclePlan("one_pass", 16, 8)
    rng = random.Random(5)
    chance = {narrow: 0.5, wide: 0.9}
    for cycle in range(2000):
        plan = (narrow, wide)[cycle // 100 % 2]
        seen.observe(plan, [[Outcome(15, (rng.random() < chance[plan]) * 2)]])
    tokens = seen.tokens(PLANS)
    for plan in chance:
        assert tokens[plan] == pytest.approx(1 + 2 * chance[plan], rel=0.1)


def test_drafts_that_one_pass_lacks_count_as_rejected():
    lacking, rejected = Acceptance(15, FAN_OUTS), Acceptance(15, FAN_OUTS)
    for _ in range(50):
        for seen, outcomes in ((lacking, [(0, 0), (2, 2)]), (rejected, [(15, 0), (15, 2)])):
            seen.observe(CyclePlan("one_pass", 16, 4), [[Outcome(*out) for out in outcomes]])
    assert lacking.accepted() == rejected.accepted()


def drawn(rng: random.Random, quality, count: int) -> list[Outcome]:
    """Outcomes of 15 drafts with hazards of 0.8 times ``quality``: of the first, the second and later drafts."""
    return [
        Outcome(15, next((i for i in range(15) if rng.random() > 0.8 * quality[min(i, 2)]), 15)) for _ in range(count)
    ]


def test_one_pass_alone_tells_nothing_of_two_pass():
    """Its fan_outs inform only each other: their level stays in doubt, and so does what two_pass would yield."""
    two, running = CyclePlan("two_pass", 16), CyclePlan("one_pass", 16, 8)

    def taught(cycles):
        seen, rng = Acceptance(15, FAN_OUTS), random.Random(7)
        for cycle in range(cycles):
            fan_out = (2, 4, 8)[cycle // 64 % 3]
            seen.observe(CyclePlan("one_pass", 16, fan_out), [drawn(rng, prior_quality(fan_out), 8)])
        return seen, seen.tokens(PLANS, 1.0, running)[two] / seen.tokens(PLANS)[two]

    (early, doubt), (late, later_doubt) = taught(300), taught(3000)
    assert [x.tolist() for x in late._level.estimate()] == [x.tolist() for x in early._level.estimate()]
    assert doubt > later_doubt > 1.15  # only the shapes become more certain


def test_what_two_pass_brings_is_believed_soon():
    """A long run of one_pass alone, with a model whose one_pass is worse than most, then a few trials of two_pass."""
    seen, rng = Acceptance(15, FAN_OUTS), random.Random(3)
    two, one = CyclePlan("two_pass", 16), CyclePlan("one_pass", 16, 8)

    def cycles(plan, quality, count):
        for _ in range(count):
            seen.observe(plan, [drawn(rng, quality, 8)])

    worse = 0.75 * prior_quality(8)[0], 0.75 * prior_quality(8)[1], 0.97
    cycles(one, worse, 1000)
    assert seen.tokens(PLANS)[two] < 3.6
    for _ in range(4):
        cycles(two, (1, 1, 1), 8)
        cycles(one, worse, 64)
    assert seen.tokens(PLANS)[two] > 4.3  # 4.86


def test_while_ar_runs_two_pass_may_be_better_than_one_pass_let_it_look():
    seen = Acceptance(15, FAN_OUTS)
    for _ in range(200):
        seen.observe(CyclePlan("one_pass", 16, 8), [[Outcome(15, 0), Outcome(15, 2)]])
    two = CyclePlan("two_pass", 16)
    mean, beside_ar = seen.tokens(PLANS)[two], seen.tokens(PLANS, 1.0)[two]
    beside_itself = seen.tokens(PLANS, 1.0, two)[two]
    assert beside_itself == mean and beside_ar > 1.08 * mean


def test_ends_and_beginnings_are_no_rejections():
    """With requests of 24 tokens, drafts are rated as they are in long ones."""
    short, long = (Acceptance(15, FAN_OUTS) for _ in range(2))
    for plan in (CyclePlan("two_pass", 16), CyclePlan("one_pass", 16, 8)):
        for seen, length in ((short, 24), (long, 0)):
            sequences = [Sequence(random.Random(seed), 0.8) for seed in range(64)]
            for cycle in range(100):
                outs = [s.within(length, s.cycle(plan)) if length else s.cycle(plan) for s in sequences]
                if cycle or not plan.fan_out:
                    seen.observe(plan, [outs])
    for fan_out in (0, 8):
        assert short.accepted()[fan_out][15] == pytest.approx(long.accepted()[fan_out][15], rel=0.05)


@pytest.mark.parametrize("mode", ["two_pass", "one_pass"])
@pytest.mark.parametrize(("block_len", "hazard"), [(4, 0.3), (4, 0.97), (16, 0.8), (16, 0.97)])
def test_the_last_cycle_of_a_sequence_yields_what_is_left(mode, block_len, hazard):
    """Tokens per cycle of sequences of a given length, compared with a simulation of many of them."""
    plan, rng = CyclePlan(mode, block_len, 2 * (mode == "one_pass")), random.Random(0)
    accepted = [sum(hazard ** (1 + i) for i in range(drafts)) for drafts in range(block_len)]
    for length in (1, 2, 5, 16, 24, 33, 100):
        seen, cycles = Acceptance(15, FAN_OUTS), 0
        seen.accepted = lambda *_: {0: accepted, 2: accepted}
        seen._begun, seen._tokens = 10.0, 10.0 * length
        for _ in range(2000):
            left, first = length, True
            while left > 0:
                drafts = 0
                while drafts < block_len - 1 and rng.random() < hazard and not (first and mode == "one_pass"):
                    drafts += 1
                left, first, cycles = left - 1 - drafts, False, cycles + 1
        assert seen.tokens([plan])[plan] == pytest.approx(2000 * length / cycles, rel=0.09), length


def test_prior_quality_grows_with_fan_out():
    of_first, of_second, of_later = zip(*[prior_quality(f) for f in range(1, 47)], strict=True)
    assert list(of_first) == sorted(of_first) and of_first[0] == 0.53 and of_first[-1] == 0.75
    assert list(of_second) == sorted(of_second) and len(set(of_later)) == 1


def test_optimism_is_about_what_sets_a_plan_apart_from_the_one_that_runs():
    seen, running = Acceptance(15, FAN_OUTS), CyclePlan("one_pass", 8, 4)
    for _ in range(20):
        seen.observe(CyclePlan("two_pass", 16), [[Outcome(15, 2), Outcome(15, 9)]])
        seen.observe(CyclePlan("one_pass", 16, 4), [[Outcome(15, 0), Outcome(15, 6), Outcome(0, 0)]])
    mean, hope = seen.tokens(PLANS), seen.tokens(PLANS, optimism=1.0)
    assert all(hope[p] > mean[p] for p in PLANS if p != AR)
    rival = seen.tokens(PLANS, 1.0, running)
    assert rival[running] == mean[running]
    others = [p for p in PLANS if p not in (AR, running)]
    long, hopeful = seen.accepted()[4], seen.accepted(1.0, running)[4]
    assert hopeful[:8] == long[:8] and hopeful[8] > long[8]  # as far as the running plan's drafts reach
    shorter = CyclePlan("one_pass", 4, 4)  # differs only in how many of the same drafts it takes
    assert rival[shorter] == mean[shorter]
    assert all(mean[p] < rival[p] <= hope[p] for p in others if p.mode == "one_pass" and p != shorter)
    # For two_pass the ratio to one_pass is uncertain, however many drafts of this text were seen.
    assert all(mean[p] < rival[p] for p in others if p.mode == "two_pass")


@pytest.mark.parametrize("optimism", [0.0, 1.0])
def test_two_pass_alone(optimism):
    """There is no fan_out to compare it with: its own outcomes are all there is."""
    seen, plan = Acceptance(3, ()), CyclePlan("two_pass", 4)
    for _ in range(400):
        seen.observe(plan, [[Outcome(3, 2)]])
    assert seen.tokens([AR, plan], optimism, plan) == {AR: 1.0, plan: pytest.approx(3.0, rel=0.05)}


@pytest.mark.parametrize("first", (CyclePlan("one_pass", 16, 8), CyclePlan("two_pass", 16)))
def test_what_is_long_past_counts_down_to_nothing(first):
    """Without an error or a warning, even where the program asked NumPy to raise every floating-point error."""
    seen = Acceptance(15, FAN_OUTS)
    seen.observe(first, [[Outcome(15, 9)]])
    for counts in (seen._hits, seen._trials):
        counts *= np.finfo(float).tiny
    with np.errstate(all="raise"):
        for plan in (AR, CyclePlan("two_pass", 16), CyclePlan("one_pass", 16, 8)):
            for _ in range(64):
                seen.observe(plan, [[Outcome(15 if plan.mode != "ar" else 0, 0)]])
                seen.accepted(1.0)


def test_a_cycle_yields_a_token_at_least():
    """This includes a cycle whose sequence ended without one: time is weighed as if it had yielded a token."""
    outs = [Outcome(3, 0), Outcome(3, 2), Outcome(3, 2, cut=True), Outcome(3, 0, cut=True)]
    assert [out.num_tokens for out in outs] == [1, 3, 2, 1]


def test_hazards_that_nothing_is_drafted_for_fade():
    seen, fresh = (Acceptance(15, FAN_OUTS) for _ in range(2))
    for _ in range(100):
        seen.observe(CyclePlan("two_pass", 16), [[Outcome(15, 0)]])
    assert seen.accepted()[0][15] < 0.1 * fresh.accepted()[0][15]
    seen.observe(AR, [[Outcome(0, 0)]] * (8 * IDLE_MEMORY))
    for fan_out in (0, 2, 8):
        assert seen.accepted()[fan_out] == pytest.approx(fresh.accepted()[fan_out], rel=0.05)


def test_drafts_of_one_plan_renew_the_hazards_of_all():
    """As far as they reach. What lies beyond them fades as if nothing was drafted."""
    seen, row = Acceptance(15, FAN_OUTS), FAN_OUTS.index(4)
    for _ in range(100):
        seen.observe(CyclePlan("one_pass", 16, 4), [[Outcome(15, 12)]])
    before = seen._trials[row].copy()
    for _ in range(IDLE_MEMORY):
        seen.observe(CyclePlan("two_pass", 4), [[Outcome(3, 0)]])
    assert seen._trials[row, 0] < 1e-3 * before[0]
    assert seen._trials[row, 10] == pytest.approx(before[10] / np.e, rel=1e-2)


@pytest.mark.parametrize("plan", [CyclePlan("two_pass", 4), CyclePlan("one_pass", 4, 2)])
def test_drafts_that_were_all_accepted_tell_nothing_of_the_next(plan):
    seen = Acceptance(15, FAN_OUTS)
    seen.observe(plan, [[Outcome(3, 3)] * 4])
    assert seen._trials[FAN_OUTS.index(plan.fan_out)].tolist() == [4.0] * 3 + [0.0] * 12


def test_quality_fades_slowly():
    """It fades by cycles, one by one or many at a time, to what was assumed."""
    at_once, one_by_one = (Ratio(np.array([0.5, 0.7, 0.9]), 32.0) for _ in range(2))
    for ratio in (at_once, one_by_one):
        ratio.observe(np.full(3, 10.0), np.full(3, 100.0), 1)
    at_once.observe(np.zeros(3), np.zeros(3), SLOW_MEMORY)
    for _ in range(SLOW_MEMORY):
        one_by_one.observe(np.zeros(3), np.zeros(3), 1)
    for ratio in (at_once, one_by_one):
        got, doubt = ratio.estimate()
        left = 1 / np.e
        assert got == pytest.approx((32 * np.array([0.5, 0.7, 0.9]) + 10 * left) / (32 + 100 * left), rel=1e-3)
        assert doubt == pytest.approx(np.full(3, 1 / (32 + 100 * left)), rel=1e-3)


def test_one_pass_that_drafts_better_than_two_pass_is_no_better_by_its_quality():
    """Nor do optimistic estimates make it better."""
    seen, two, one = Acceptance(15, FAN_OUTS), CyclePlan("two_pass", 16), CyclePlan("one_pass", 16, 8)
    for _ in range(2000):
        seen.observe(two, [[Outcome(15, 0), Outcome(15, 4)]])
        seen.observe(one, [[Outcome(15, 15)]])
    assert float((seen._level.estimate()[0] * seen._shape.estimate()[0][-1]).max()) > 1.5
    mean, hope = seen.tokens(PLANS), seen.tokens(PLANS, 1.0)
    assert all(mean[plan] <= hope[plan] < 1.2 * mean[plan] for plan in PLANS)


@pytest.mark.parametrize("length", [10, 100])
def test_the_length_of_sequences_is_that_of_the_latest(length):
    seen = Acceptance(15, FAN_OUTS)
    for latest in (1000 // length, length):
        for _ in range(8 * IDLE_MEMORY // latest):
            seen.observe(AR, [[Outcome(0, 0, fresh=i == 0)] for i in range(latest)])
    assert seen._tokens / seen._begun == pytest.approx(length, rel=0.15)


def test_squares_are_those_of_the_tokens_of_a_cycle():
    alive = [0.9**i / (1 + i) for i in range(16)]  # chance that this many drafts or more are accepted
    squares = acceptance._squares([sum(alive[1 : 1 + i]) for i in range(16)])
    for drafts, got in enumerate(squares):
        chance = [a - b for a, b in itertools.pairwise([*alive[: drafts + 1], 0.0])]
        assert got == pytest.approx(sum((1 + n) ** 2 * p for n, p in enumerate(chance)) - 1)


def test_what_a_drafts_prior_is_worth():
    """4 trials for the first draft and 8 for a later one, which is as good as the one before times ``step``."""
    first, second = (4 * 0.7 + 3) / (4 + 4), (8 * (4 * 0.7 + 3) / (4 + 4) * 0.9 + 1) / (8 + 2)
    chain = Acceptance._chain([3.0, 1.0], [4.0, 2.0], 0.7, [0.9], 0.0, 0)
    assert chain == pytest.approx([0.0, first, first + first * second])


def test_optimism_is_about_drafts_beyond_those_that_run():
    """By standard errors, not above certainty, and not passed on to later drafts."""
    first, rates = (4 * 0.7 + 3) / 8, []
    second = (8 * first * 0.9 + 1) / 10
    for rate, trials in ((second, 10), (second * 0.8, 8)):
        rates.append(rate + math.sqrt(rate * (1 - rate) / trials))
    expected = list(itertools.accumulate([0.0, first, first * rates[0], first * rates[0] * rates[1]]))
    told = [3.0, 1.0, 0.0], [4.0, 2.0, 0.0], 0.7, [0.9, 0.8]
    assert Acceptance._chain(*told, 1.0, 1) == pytest.approx(expected)
    assert Acceptance._chain(*told, 99.0, 1) == pytest.approx([0.0, first, 2 * first, 3 * first])
