"""What an engine counts, as a dictionary and in Prometheus' text form."""

import gc
import weakref
from functools import partial

import pytest

from orthrus_rt import dispatch
from orthrus_rt.sampling import SamplingParams
from tests import engines

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the native module is not built")
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


def test_metrics_count_what_happened(folder):
    engine = make(folder, mode="two_pass")
    outs = engine.generate([[1, 2, 3], [4]], SamplingParams(max_new_tokens=10, ignore_eos=True))
    facts = engine.metrics.as_dict()
    assert facts["tokens"] == 20 and facts["prompt_tokens"] == 4 and facts["finished"]["length"] == 2
    assert facts["passes"] == 2 * facts["cycles"]
    assert sum(facts["accepted"].values()) == sum(o.stats.cycles for o in outs)
    text = engine.metrics.as_prometheus()
    assert "orthrus_tokens_total 20\n" in text and 'orthrus_finished_total{reason="length"} 2\n' in text
    assert f"orthrus_accepted_drafts_count {sum(o.stats.cycles for o in outs)}\n" in text
    buckets = [line for line in text.splitlines() if line.startswith("orthrus_accepted_drafts_bucket")]
    assert [b.split('"')[1] for b in buckets] == [*map(str, range(8)), "+Inf"]  # the same in every scrape
    prefills, cycles = facts["times"]["prefill"], facts["times"]["two_pass_cycle"]
    assert prefills["count"] == 1  # both prompts in one pass
    assert facts["times"]["recording"]["count"] == 1 and cycles["count"] == facts["cycles"] - 1
    assert 0 < prefills["seconds"] + cycles["seconds"] <= facts["busy_seconds"]
    assert f'orthrus_device_seconds_count{{kind="two_pass_cycle"}} {facts["cycles"] - 1}\n' in text
    assert (facts["waiting"], facts["running"], facts["pages_free"]) == (0, 0, facts["pages"])


def test_latencies_are_those_of_the_requests(folder):
    engine = make(folder, max_batch_size=1)
    outs = engine.generate([[1, 2, 3], [4]], SamplingParams(max_new_tokens=10, ignore_eos=True))
    outs.append(engine.generate([5], SamplingParams(max_new_tokens=1)))
    facts, text = engine.metrics.as_dict(), engine.metrics.as_prometheus()
    waited = [o.stats.queue_seconds + o.stats.prefill_seconds for o in outs]
    assert facts["first_token"]["count"] == 3 and facts["first_token"]["seconds"] == pytest.approx(sum(waited))
    each = [o.stats.seconds / 9 for o in outs[:2]]  # the last has no further token
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
