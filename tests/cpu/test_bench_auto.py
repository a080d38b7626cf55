"""What ``bench_auto`` compares, and with what."""

import random
from types import SimpleNamespace

import pytest
import torch

from bench import bench_auto
from bench.bench_auto import Decoding, decode, decode_together, fastest, noise, orders, row_of
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.engine import Engine
from tests.engines import make


def test_the_fastest_plan_is_the_one_of_the_best_median():
    assert fastest({"lucky once": [1, 1, 9], "steady": [2, 2, 2]}) == "steady"


def test_every_plan_runs_once_a_round_and_as_often_before_another_as_after_it():
    rounds = list(orders(["a", "b", "c"], 6))
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {"a", "b", "c"}
    for one, other in ("ab", "bc", "ca"):
        assert sum(order.index(one) < order.index(other) for order in rounds) == 3


def test_ratios_are_of_one_round():
    rates = {"ar": [100.0, 50.0, 80.0], "two_pass/3": [120.0, 70.0, 90.0], "auto": [110.0, 55.0, 88.0]}
    row = row_of("auto", rates, "two_pass/3")
    assert row["plan"] == "auto" and row["rounds"] == 3 and row["tok_s"] == 88.0
    assert row["over_ar"] == pytest.approx(1.1) and row["over_best_fixed"] == pytest.approx(110 / 120)
    assert row["noise"] is None  # three rounds are too few


def test_the_noise_is_the_standard_error_of_a_median():
    drawn, deviation, number = random.Random(0), 0.05, 25
    samples = [[drawn.gauss(1, deviation) for _ in range(number)] for _ in range(400)]
    medians = [sorted(ratios)[number // 2] for ratios in samples]
    error = (sum((m - 1) ** 2 for m in medians) / len(medians)) ** 0.5
    assert sum(map(noise, samples)) / len(samples) == pytest.approx(error, rel=0.15)


@pytest.mark.native
def test_a_fresh_policy_leaves_the_engines_own_alone(folder):
    engine = make(folder, mode="auto", max_seq_len=128)
    (auto,) = engine._autos.values()
    policy, prompts, how = auto.policy, [[1, 2, 3], [4]], (20, 1000)
    fixed, own = decode(engine, prompts, *how, CyclePlan("two_pass", 4)), decode(engine, prompts, *how, None)
    seen = str(policy.plan_counts)
    first = decode(engine, prompts, *how, None, fresh=True)
    assert fixed.tokens == own.tokens == first.tokens and sum(map(len, own.tokens)) > 20
    assert list(engine._autos.values()) == [auto] and auto.policy is policy and str(policy.plan_counts) == seen


class Counted(Decoding):
    """Yields these numbers of tokens, a step each."""

    def __init__(self, name, tokens, log):
        self.name, self.left, self.log, self.num = name, list(tokens), log, 0

    @property
    def num_tokens(self):
        return self.num

    def step(self):
        self.log.append(self.name)
        if self.left:
            self.num += self.left.pop(0)
        return bool(self.left)

    def end(self):
        return self.name, self.num


def test_whoever_has_the_fewest_tokens_takes_the_next_step():
    """Until each has enough, or has ended."""
    log = []
    ended = decode_together(
        [Counted("ar", [1] * 9, log), Counted("drafts", [3] * 9, log), Counted("short", [1], log)], 5
    )
    assert log == ["ar", "drafts", "short", *["ar"] * 2, "drafts", *["ar"] * 2]
    assert ended == [("ar", 5), ("drafts", 6), ("short", 1)]


@pytest.mark.native
def test_on_a_cpu_the_compared_plans_decode_at_the_same_time(folder, monkeypatch):
    """In engines over the same weights; before that, every fixed plan by itself."""
    engines, models, together = [], set(), []

    def make_engine(kind, batch, device):
        engines.append(make(folder, mode="auto", max_seq_len=128, max_batch_size=batch))
        models.add(engines[-1].runner.model)
        return engines[-1]

    def watched(decodings, most):
        together.append({decoding._engine for decoding in decodings})
        return decode_together(decodings, most)

    texts = [SimpleNamespace(encode=lambda tokenizer, first=first: [first, 5, 9]) for first in range(3, 6)]
    monkeypatch.setattr(Engine, "tokenizer", None)
    monkeypatch.setattr(bench_auto, "make_engine", make_engine)
    monkeypatch.setattr(bench_auto, "decode_together", watched)
    monkeypatch.setattr(bench_auto.prompts, "load", lambda kind: texts)
    how = SimpleNamespace(device=torch.device("cpu"), tokens=8, most_rows=8, fixed_rounds=1, rounds=6)
    rows = {row["plan"]: row for row in bench_auto.measure("code", 2, how)}
    assert list(rows) == ["ar", "two_pass/3", "auto first", "auto"]
    compared = [plan for plan, row in rows.items() if row["rounds"] == 6]
    assert {"ar", "auto first", "auto"} <= set(compared) and all(rows[plan]["noise"] is not None for plan in compared)
    assert len(engines) == len(compared) and len(models) == 1 and all(engine.closed for engine in engines)
    assert together[-6:] == [set(engines)] * 6 and {len(group) for group in together[:-6]} == {1}
