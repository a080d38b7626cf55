"""What ``bench_auto`` compares, and with what."""

import pytest

from bench.bench_auto import decode, decode_first, fastest
from orthrus_rt import dispatch
from orthrus_rt.cycle_plan import CyclePlan
from tests.engines import make


def test_the_fastest_plan_of_all_rounds_or_of_all_but_one():
    rates = {"lucky once": [1, 1, 9, 2.2, 2.1], "steady": [2, 2, 2, 2, 2]}
    assert fastest(rates) == "lucky once"
    assert [fastest(rates, but=i) for i in range(5)] == ["lucky once"] * 2 + ["steady"] * 3
    assert fastest({"a": [1.0], "b": [2.0]}, but=0) == "b"


@pytest.mark.skipif(dispatch.extension() is None, reason="the native module is not built")
def test_a_fresh_policy_leaves_the_engines_own_alone(folder):
    engine = make(folder, mode="auto", max_seq_len=128)
    (auto,) = engine._autos.values()
    policy, prompts, how = auto.policy, [[1, 2, 3], [4]], (20, 1000)
    fixed, own = decode(engine, prompts, *how, CyclePlan("two_pass", 4)), decode(engine, prompts, *how, None)
    seen = str(policy.plan_counts)
    first = decode_first(engine, prompts, *how)
    assert fixed.tokens == own.tokens == first.tokens and sum(map(len, own.tokens)) > 20
    assert list(engine._autos.values()) == [auto] and auto.policy is policy and str(policy.plan_counts) == seen
