"""What an engine counts, as a dictionary and in Prometheus' text form."""

import gc
import time
import weakref
from functools import partial

import pytest
import torch

from orthrus_rt.metrics import Latencies
from orthrus_rt.outputs import Stats
from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.failing import exhausted

pytestmark = pytest.mark.native
make = partial(engines.make, max_seq_len=256, max_batch_size=8)


def test_an_engine_that_nobody_holds_is_freed_at_once(folder):
    engine = make(folder)
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=4))
    metrics, gone = engine.metrics, weakref.ref(engine)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()
    assert metrics.as_dict()["pages"] == 0 and "orthrus_tokens_total 4\n" in metrics.as_prometheus()


def test_prometheus_text_says_what_each_metric_is(folder):
    text = make(folder).metrics.as_prometheus().splitlines()
    helped = [line.split()[2] for line in text if line.startswith("# HELP ")]
    assert helped == [line.split()[2] for line in text if line.startswith("# TYPE ")]
    assert all(len(line.split()) > 4 for line in text if line.startswith("# HELP "))
    gauges = {line.split()[2] for line in text if line.endswith(" gauge")}
    names = ("waiting", "running", "pages_free", "pages", "plan_info")
    assert gauges == {f"orthrus_{name}" for name in names}


def test_metrics_count_what_happened(folder):
    engine = make(folder, mode="two_pass")
    outs = engine.generate([[1, 2, 3], [4]], SamplingParams(max_new_tokens=10, ignore_eos=True))
    facts = engine.metrics.as_dict()
    assert facts["tokens"] == 20 and facts["prompt_tokens"] == 4 and facts["finished"]["length"] == 2
    assert facts["passes"] == 2 * facts["cycles"]
    assert sum(facts["accepted"].values()) == sum(o.stats.cycles for o in outs)
    assert facts["drafted"] == sum(o.stats.drafted for o in outs) > 3 * facts["cycles"]  # fewer before the limit
    assert sum(j * n for j, n in facts["accepted"].items()) <= facts["drafted"] <= 7 * sum(facts["accepted"].values())
    text = engine.metrics.as_prometheus()
    assert f"orthrus_drafted_total {facts['drafted']}\n" in text
    assert "orthrus_tokens_total 20\n" in text and 'orthrus_finished_total{reason="length"} 2\n' in text
    assert f"orthrus_accepted_drafts_count {sum(o.stats.cycles for o in outs)}\n" in text
    assert f"orthrus_accepted_drafts_sum {sum(n * count for n, count in facts['accepted'].items())}\n" in text
    buckets = [line for line in text.splitlines() if line.startswith("orthrus_accepted_drafts_bucket")]
    assert [b.split('"')[1] for b in buckets] == [*map(str, range(8)), "+Inf"]  # the same in every scrape
    prefills, cycles = facts["times"]["prefill"], facts["times"]["two_pass_cycle"]
    assert prefills["count"] == 1  # both prompts in one pass
    assert facts["times"]["recording"]["count"] == 1 and cycles["count"] == facts["cycles"] - 1
    assert 0 < prefills["seconds"] + cycles["seconds"] <= facts["busy_seconds"]
    assert f'orthrus_device_seconds_count{{kind="two_pass_cycle"}} {facts["cycles"] - 1}\n' in text
    assert (facts["waiting"], facts["running"], facts["pages_free"]) == (0, 0, facts["pages"])


def test_cycles_without_drafts_are_no_failure_of_drafts(folder):
    engine, params = make(folder, mode="two_pass"), SamplingParams(max_new_tokens=10, ignore_eos=True)
    engine.generate([1, 2, 3], params)
    before = engine.metrics.as_dict()
    out = engine.generate([1, 2, 3], params, mode="ar")
    after = engine.metrics.as_dict()
    assert out.stats.cycles == 9 == after["plans"]["ar"] and out.stats.drafted == 0
    assert [after[name] for name in ("drafted", "accepted")] == [before[name] for name in ("drafted", "accepted")]


def test_latencies_are_those_of_the_requests(folder):
    engine = make(folder, max_batch_size=1)
    outs = engine.generate([[1, 2, 3], [4]], SamplingParams(max_new_tokens=10, ignore_eos=True))
    outs.append(engine.generate([5], SamplingParams(max_new_tokens=1)))
    facts, text = engine.metrics.as_dict(), engine.metrics.as_prometheus()
    waited = [o.stats.queue_seconds + o.stats.prefill_seconds for o in outs]
    assert facts["first_token"]["count"] == 3 and facts["first_token"]["seconds"] == pytest.approx(sum(waited))
    each = [o.stats.seconds / 9 for o in outs[:2]]  # the last request has no token after its first
    assert facts["per_token"]["count"] == 2 and facts["per_token"]["seconds"] == pytest.approx(sum(each))
    for name, seen in (("first_token", waited), ("per_token", each)):
        for bound, count in facts[name]["at_most"].items():
            assert count == sum(seconds <= bound for seconds in seen), (name, bound)
            assert f'orthrus_{name}_seconds_bucket{{le="{bound}"}} {count}\n' in text
        assert f"orthrus_{name}_seconds_count {len(seen)}\n" in text


def test_an_aborted_request_has_no_time_per_token(folder):
    engine = make(folder)
    name = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    while engine.metrics.tokens < 5:
        engine.step()
    engine.abort(name)
    engine.step()
    facts = engine.metrics.as_dict()
    assert (facts["first_token"]["count"], facts["per_token"]["count"]) == (1, 0)


def test_nor_has_one_that_could_not_go_on(folder, monkeypatch):
    engine = make(folder)
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    while engine.metrics.tokens < 5:
        engine.step()
    monkeypatch.setattr(engine.runner, "decode", exhausted)
    (out,) = engine.step()
    assert out.finish_reason == "error" and engine.metrics.as_dict()["per_token"]["count"] == 0


def test_a_latency_of_a_bound_is_within_it():
    latencies = Latencies()
    latencies.add(0.001)
    at_most = latencies.as_dict()["at_most"]
    assert (at_most[0.0005], at_most[0.001]) == (0, 1)


def test_who_runs_and_who_waits(folder):
    engine = make(folder, max_batch_size=1)
    for i in range(3):
        engine.submit([i], SamplingParams(max_new_tokens=9, ignore_eos=True))
    engine.step()
    facts = engine.metrics.as_dict()
    assert (facts["running"], facts["waiting"]) == (1, 2)


def test_rates_leave_the_token_of_the_prefill_out():
    stats = Stats("two_pass", 8, 0, tokens=13, cycles=4, passes=8, seconds=3.0)
    assert (stats.tokens_per_cycle, stats.tokens_per_pass, stats.tokens_per_second) == (3.0, 1.5, 4.0)
    assert Stats("", 0, 0, tokens=1).tokens_per_second == 0.0


def test_cycles_by_rejection_record_nothing(folder):
    engine = make(folder, mode="two_pass")
    engine.generate([1, 2], SamplingParams(9, temperature=0.8, seed=1, ignore_eos=True, acceptance="rejection"))
    facts = engine.metrics.as_dict()
    assert {kind: of["count"] for kind, of in facts["times"].items()} == {
        "prefill": 1, "two_pass_cycle": facts["cycles"],
    }  # fmt: skip


def test_what_a_preemption_costs_is_counted(folder):
    engine = make(folder, prefix_caching=False)
    engine.submit([5] * 40, SamplingParams(max_new_tokens=20, ignore_eos=True))
    (request,) = engine.scheduler.unfinished
    for _ in range(3):
        engine.step()
    with torch.inference_mode():
        engine._preempt(request)
    known = request.num_known
    engine.step()
    facts = engine.metrics.as_dict()
    assert (facts["prompt_tokens"], facts["recomputed_tokens"], facts["preemptions"]) == (40, known, 1)


def test_device_times_add_up_and_a_latency_beyond_all_bounds_is_one(folder):
    metrics = make(folder).metrics
    assert "plan_info{" not in metrics.as_prometheus()
    for seconds in (0.25, 0.5):
        metrics.took("prefill", seconds), metrics.first_token.add(1000 * seconds)
    text = metrics.as_prometheus()
    assert 'orthrus_device_seconds_sum{kind="prefill"} 0.75\n' in text
    assert 'orthrus_first_token_seconds_bucket{le="60.0"} 0\n' in text
    assert 'orthrus_first_token_seconds_bucket{le="+Inf"} 2\n' in text


def test_drafts_accepted_are_a_histogram_of_at_most_so_many(folder):
    metrics = make(folder).metrics
    for accepted in (0, 2, 2, 3):
        metrics.verified(7, accepted)
    counts = [line.split()[1] for line in metrics.as_prometheus().splitlines() if "accepted_drafts_bucket" in line]
    assert counts[:4] == ["1", "1", "3", "4"] and set(counts[4:]) == {"4"}


def test_a_step_that_fails_was_busy_too(folder, monkeypatch):
    engine = make(folder)
    engine.submit([1], SamplingParams(max_new_tokens=4))
    monkeypatch.setattr(engine.runner, "prefill", lambda *_: (time.sleep(0.05), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert engine.metrics.busy_seconds >= 0.05


def test_a_copy_of_the_statistics_stays_as_it_is():
    stats = Stats("two_pass", 8, 0, plans={"ar": 1}, accepted=[1])
    now = stats.copy()
    stats.accepted[0] = stats.plans["ar"] = 2
    assert now.accepted == [1] and now.plans == {"ar": 1}
