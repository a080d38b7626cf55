"""Prompts that share the last pass of a cycle with the rows of decoding sequences: one read of the weights."""

from functools import partial

import pytest
import torch

from orthrus_rt import ops
from orthrus_rt.cycle import Cycle
from orthrus_rt.prefill import PrefillShape, PromptRows
from orthrus_rt.rows import Layout
from orthrus_rt.runner import CHUNK_BESIDE
from orthrus_rt.sampling import SamplingParams
from tests import engines, lossless
from tests.traces import arriving, assert_same, decode

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

GREEDY = SamplingParams(20, ignore_eos=True)
SAMPLED = SamplingParams(20, temperature=0.8, seed=1, ignore_eos=True)
EDITED = SamplingParams(20, temperature=0.7, seed=3, frequency_penalty=0.5, logit_bias={5: 1.0}, min_tokens=20)
JOBS = [
    ([1, 2, 3], GREEDY),
    ([4] * 70, SAMPLED),
    ([5, 6], EDITED),
    ([7] * 130, GREEDY),
    ([8], SAMPLED),
    ([9] * 9, GREEDY),
]
MODES = {"ar": {}, "two_pass": {"draft_len": 5}, "one_pass": {"draft_len": 3, "fan_out": 2}, "auto": {}}
PINNED = {"ar": 1.0, "two_pass": 1.52, "one_pass": 1.10}  # tokens per cycle


@pytest.fixture
def make(folder):
    return partial(engines.make, folder, max_seq_len=256, max_batch_size=4, prefix_caching=False)


def count(engine, kind):
    return engine.metrics.times.get(kind, (0, 0.0))[0]


@pytest.mark.parametrize("records", (False, True), ids=("taped at once", "kept"))
@pytest.mark.parametrize("mode", MODES)
def test_whoever_arrives_changes_no_bit(make, mode, records):
    """Greedy, sampled and edited together: tokens, logits and cache of each as alone, and the same drafts."""
    prompts, params = (list(column) for column in zip(*JOBS, strict=True))
    lonely = make(mode=mode, **MODES[mode])
    alone = decode(lonely, prompts, params)
    engine = make(records, mode=mode, **MODES[mode])
    for every in (1, 2, 3):
        before = count(engine, "mixed_cycle")
        got = arriving(engine, JOBS, every)
        assert_same(got, alone, (mode, every))
        if mode != "auto":
            assert count(engine, "mixed_cycle") > before
            assert [t.tokens_per_cycle for t in got] == [t.tokens_per_cycle for t in alone]
            assert lossless.rate(got) == pytest.approx(PINNED[mode], abs=0.01)
    assert count(engine, "mixed_cycle") > 0  # for auto, any at all: which cycles take prompts depends on the clock
    kept = [known for known in engine.runner._with_prompts.values() if isinstance(known, Cycle)]
    assert any(known.settled for known in kept) == records


def test_one_cycle_does_both(make):
    engine = make()
    first = engine.submit([1, 2, 3], GREEDY)
    engine.step()
    passes, second = engine.metrics.passes, engine.submit([4, 5], GREEDY)
    told = {out.request_id: out.new_token_ids for out in engine.step()}
    assert engine.metrics.passes == passes + 2 and len(told[first]) >= 1 and len(told[second]) == 1
    assert (count(engine, "prefill"), count(engine, "mixed_cycle")) == (1, 1)


def test_decoding_does_not_stop_for_a_long_prompt(make, monkeypatch):
    """Each pass takes as much of the prompt as it can. The prompt's first token arrives with its last chunk."""
    monkeypatch.setitem(CHUNK_BESIDE, "cpu", 32)
    engine = make(mode="ar")
    want = make().generate([5] * 100, GREEDY).token_ids
    first = engine.submit([1, 2, 3], SamplingParams(60, ignore_eos=True))
    engine.step()
    second, tokens, rows = engine.submit([5] * 100, GREEDY), {}, []
    load = PromptRows.load
    monkeypatch.setattr(PromptRows, "load", lambda this, *args: rows.append(this.rows.num_rows) or load(this, *args))
    while engine.has_unfinished():
        for out in engine.step():
            tokens.setdefault(out.request_id, []).extend(out.new_token_ids)
        if second not in tokens:
            assert len(tokens[first]) == len(rows)  # a token for every chunk
    assert rows == [33, 33, 33, 5] and tokens[second] == want  # one row is the cycle's own


@pytest.mark.parametrize("runs", (True, False), ids=("runs", "arrives"))
def test_passes_of_their_own_beside_choices_that_the_host_makes(make, runs):
    rejection = SamplingParams(20, temperature=0.8, seed=1, ignore_eos=True, acceptance="rejection")
    one, two = (rejection, GREEDY) if runs else (GREEDY, rejection)
    want = [make().generate(*job).token_ids for job in (([1, 2], one), ([3, 4], two))]
    engine = make()
    ids = [engine.submit([1, 2], one)]
    engine.step()
    ids.append(engine.submit([3, 4], two))
    got = engines.drain(engine)
    assert want[0][1:] == got[ids[0]][0] and want[1] == got[ids[1]][0]
    assert (count(engine, "prefill"), count(engine, "mixed_cycle")) == (2, 0)


def test_beside_rejection_whoever_ends_makes_room_in_the_same_step(make):
    """No cycle runs with an empty slot that a request waits for: prompts do not go along with the next cycle."""
    rejection = SamplingParams(100, temperature=0.8, seed=1, ignore_eos=True, acceptance="rejection")
    engine = make(max_batch_size=2)
    _, second, third = engine.submit([1], rejection), engine.submit([2], GREEDY), engine.submit([3], GREEDY)
    told = {}
    while second not in told or not told[second].finished:
        assert third not in told
        told = {out.request_id: out for out in engine.step()}
    assert len(told[third].new_token_ids) == 1


def test_auto_times_cycles_by_themselves(make, tmp_path, monkeypatch):
    """A plan whose cost is a guess runs by itself to be timed, although prompts arrive all the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine, (auto,) = (made := make(mode="auto")), made._autos.values()
    engine.submit([1, 2, 3], SamplingParams(200, ignore_eos=True))
    while engine.has_unfinished():
        if len(engine.scheduler.waiting) < 2:
            engine.submit([4, 5], SamplingParams(1, ignore_eos=True))
        engine.step()
        if engine.metrics.cycles == 100:
            break
    costs = auto.policy.costs
    assert len({plan for bucket, plan in costs._log if bucket == 1}) > 1 and count(engine, "mixed_cycle") > 50


def test_edits_of_a_prompt_in_a_slot_beyond_the_cycles(make, monkeypatch):
    """The reference looks lengths up by slot, so those of slots that the cycle does not have must be there as well."""
    monkeypatch.setenv("ORTHRUS_BACKEND", "process_logits=reference")
    jobs = [([1, 2, 3], EDITED), ([5, 6], EDITED)]
    want = decode(make(mode="ar"), *(list(column) for column in zip(*jobs, strict=True)))
    engine = make(mode="ar")
    assert_same(arriving(engine, jobs, every=2), want)
    assert count(engine, "mixed_cycle") == 1


def test_the_third_of_a_kind_runs_no_python_per_op(make, monkeypatch):
    """Where they are kept: first it runs op by op, then while it is recorded, then as replays."""
    engine, calls, real = make(True, mode="ar"), [], ops.embed
    engine.submit([1, 2, 3], SamplingParams(100, ignore_eos=True))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(ops, "embed", lambda *args: calls.append(args) or real(*args))
    for length, want in ((5, 1), (16, 2), (9, 2), (17, 3), (3, 3), (31, 4), (20, 4)):
        engine.submit([7] * length, SamplingParams(1, ignore_eos=True))
        engine.step()
        engine.step()
        assert len(calls) == want
    kept = engine.runner._with_prompts.values()
    assert (count(engine, "mixed_cycle"), len(kept)) == (5, 3)  # two shapes, and that of the first prompt
    assert engine.memory_report()["cycles"] >= sum(known.nbytes for known in kept) > 0


def test_without_memory_a_newcomer_ends_alone(make, monkeypatch):
    engine, init = make(), Cycle.__init__
    want = make().generate([1, 2, 3], GREEDY).token_ids

    def refuse(cycle, *args, shape=None, **kwargs):
        if shape is not None and shape.rows > 4:
            raise torch.OutOfMemoryError("injected")
        init(cycle, *args, shape=shape, **kwargs)

    monkeypatch.setattr(Cycle, "__init__", refuse)
    first = engine.submit([1, 2, 3], GREEDY)
    engine.step()
    others = [engine.submit([4] * n, GREEDY) for n in (3, 9)]
    got = engines.drain(engine)
    assert got[first] == (want[1:], "length") and got[others[1]] == ([], "error") and got[others[0]][1] == "length"
    assert engine.kv.num_free_pages == engine.kv.num_pages


def test_rows_of_prompts_before_a_cycles_own():
    """Groups and positions of all rows, and of both parts; a load leaves nothing of the one before."""
    shape, own = PrefillShape(rows=8, groups=3, tallest=5, chosen=2, scored=False), Layout(2, 2, 2, 3, 2)
    this = PromptRows(shape, "cpu", own, [0, 1, 4])
    this.own.position.fill_(7)
    this.load([([5, 6, 7], 10, 1), ([8, 9], 0, 0)], [2, 4])
    rows, (prompts, mine) = this.rows, this.rows.parts
    assert rows.token[:8].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert rows.position[:8].tolist() == [10, 11, 12, 0, 1, -1, -1, -1]
    assert rows.prefix_len[:8].tolist() == [11, 12, 13, 1, 2, 0, 0, 0] and rows.seq[:5].tolist() == [1, 1, 1, 0, 0]
    assert rows.group_start.tolist() == [0, 3, 5, 8, 10, 12, 15, 18]
    assert (rows.num_rows_ar, rows.num_groups_ar, rows.num_rows_diff, rows.max_group_rows) == (12, 5, 6, 5)
    assert prompts.group_start.tolist() == [0, 3, 5, 8] and prompts.num_rows_ar == prompts.num_rows == 8
    assert mine is this.own and mine.group_start.tolist() == [0, 2, 4, 7, 10] and mine.num_rows_diff == 6
    assert (prompts.blocks_per_seq, mine.blocks_per_seq) == (1, 2)
    assert mine.position.tolist() == [-1] * 10  # to be staged anew
    assert this.logit_rows.tolist() == [8, 9, 12, 2, 4]
    this.load([([1], 0, 2)], [0])
    assert rows.position[:8].tolist() == [0] + [-1] * 7 and rows.group_start[:4].tolist() == [0, 1, 1, 8]
