"""Many requests at once: whichever join, leave, are aborted, preempted or hit by a fault, every other request gets
exactly the tokens that it gets alone, and all pages are freed. On a tiny bf16 model with the native CPU kernels.
"""

import dataclasses
import random
import threading
import time
import weakref
from functools import partial

import pytest
import torch

from orthrus_rt.cycle_plan import CyclePlan, batch_bucket, batch_buckets
from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.engines import all_pages_back, drain, take

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

VOCAB = 96
make = partial(engines.make, max_seq_len=256, max_batch_size=8)
BEGINNINGS = [[(7 * i + j * j) % VOCAB for j in range(n)] for i, n in enumerate((64, 100, 150))]


def request(rng, longest=60):
    """A random prompt; many of the long ones share a common beginning. Some requests have stop ids that many outputs
    contain, and some are sampled or have edited logits.
    """
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]
    if longest > 150 and rng.random() < 0.5:
        prompt = (rng.choice(BEGINNINGS) + prompt)[:longest]
    stops = tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 8))))
    length = rng.randint(1, 40)
    more = {}
    if rng.random() < 0.2:
        more = {"temperature": 0.8, "top_k": rng.choice((0, 5)), "seed": rng.randrange(1000)}
    if rng.random() < 0.2:
        more |= {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "min_tokens": rng.randint(0, length)}
        more["logit_bias"] = {rng.randrange(VOCAB): 1.5}
    return prompt, SamplingParams(length, stop_token_ids=stops, ignore_eos=rng.random() < 0.5, **more)


def submit_many(engine, rng, count):
    """Submit random requests; returns them by their ids."""
    jobs = [request(rng) for _ in range(count)]
    return {engine.submit(*job): job for job in jobs}


@pytest.mark.parametrize("mode", ("ar", "two_pass"))
def test_a_batch_gives_what_each_gives_alone(folder, alone, mode):
    rng = random.Random(1)
    engine = make(folder, mode=mode)
    jobs = [request(rng) for _ in range(20)]
    outs = engine.generate([p for p, _ in jobs], [q for _, q in jobs])
    assert [o.token_ids for o in outs] == [alone(*job) for job in jobs]
    all_pages_back(engine)
    if mode == "two_pass":  # the drafter too: it does draft, and the same drafts are accepted, cycle for cycle
        lonely = make(folder, max_batch_size=1, mode=mode)
        assert [o.stats.accepted for o in outs] == [lonely.generate(*job).stats.accepted for job in jobs]
        assert sum(o.stats.tokens - 1 for o in outs) / sum(o.stats.cycles for o in outs) > 1.5


def test_the_cache_holds_the_same_bits_alone_or_batched(folder):
    """Prefill chunking and the other rows of a pass change no bit of the keys and values."""
    rng = random.Random(5)
    prompt = [rng.randrange(VOCAB) for _ in range(150)]
    held = []
    for company in (0, 3):
        engine = make(folder)
        others = [engine.submit(*request(rng)) for _ in range(company)]
        mine = engine.submit(prompt, SamplingParams(max_new_tokens=2, ignore_eos=True))
        while not any(out.request_id == mine for out in engine.step()):
            pass
        slot = next(r.slot for r in engine.scheduler.active if r.request_id == mine)
        pages = engine.kv.page_table[slot, :2].long()  # 128 whole positions
        held.append(engine.kv.pages[:, :, pages].clone())
        assert len(others) == company
        engine.close()
    assert torch.equal(held[0].view(torch.int16), held[1].view(torch.int16))


def test_prompts_share_prefill_passes(folder, alone):
    """As many as fit, in the order of their arrival, greedy and sampled together. A long prompt delays those that
    follow only for as long as its own chunks take.
    """
    engine = make(folder)
    rng = random.Random(2)
    lengths = (100, 3, 200, 1, 250, 60)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]
    sampled = SamplingParams(max_new_tokens=5, temperature=0.8, seed=1, repetition_penalty=1.1, ignore_eos=True)
    params = [SamplingParams(max_new_tokens=5, ignore_eos=True), sampled] * 3
    ids = [engine.submit(*job) for job in zip(prompts, params, strict=True)]
    first = [out.request_id for out in engine.step()]
    assert first == ids[:4]  # 304 tokens, and 208 of the next prompt's 250
    assert [r.prefilled for r in engine.scheduler.active] == [100, 3, 200, 1, 208]
    got = {request_id: tokens for request_id, (tokens, _) in drain(engine).items()}
    for request_id, prompt, p in zip(ids, prompts, params, strict=True):
        assert got[request_id] == alone(prompt, p)[1 if request_id in first else 0 :]
    facts = engine.metrics.as_dict()
    assert [facts["times"][kind]["count"] for kind in ("prefill", "mixed_cycle")] == [1, 1]
    assert (facts["prompt_tokens"], facts["recomputed_tokens"]) == (sum(lengths), 0)


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_aborts_and_few_pages(folder, alone, seed):
    """Requests through 8 slots with pages for about three long ones: arrivals, aborts, preemption."""
    rng = random.Random(seed)
    engine = make(folder, num_pages=6, mode="one_pass" if seed == 0 else "two_pass")
    begin, left = engine.runner.begin, []

    def begun(request):
        left.append(int(engine.runner.state.num_drafts[request.slot]))
        begin(request)
        assert int(engine.runner.state.num_drafts[request.slot]) == 0

    engine.runner.begin = begun
    todo, jobs, got, aborted = 60 if seed == 0 else 300, {}, {}, set()
    while todo or engine.has_unfinished():
        for _ in range(min(todo, rng.choice((0, 0, 1, 2, 12)))):
            job = request(rng, 200)
            jobs[engine.submit(*job)] = job
            todo -= 1
        take(engine.step(), got)
        unfinished = [i for i in jobs if got.get(i, (0, None))[1] is None and i not in aborted]
        if unfinished and rng.random() < 0.05:
            aborted.add(unfinished[0])
            engine.abort(unfinished[0])
    assert set(got) == set(jobs)
    for request_id, job in jobs.items():
        tokens, reason = got[request_id]
        want = alone(*job)
        if request_id in aborted:
            assert reason == "abort" and tokens == want[: len(tokens)]
        else:
            assert tokens == want and reason in ("stop", "length")
    assert min(engine.metrics.preemptions, engine.metrics.recomputed_tokens, engine.metrics.cached_tokens) > 0
    least, most = (sum(len(jobs[i][0]) for i in ids) for ids in (jobs.keys() - aborted, jobs))
    assert least <= engine.metrics.prompt_tokens <= most
    assert any(left) == (engine.mode == "one_pass")  # drafts of preempted or aborted requests; begin drops them
    all_pages_back(engine)


@pytest.mark.full
def test_a_thousand_requests(folder, alone):
    rng = random.Random(9)
    engine = make(folder)
    jobs = submit_many(engine, rng, 1000)
    got = drain(engine)
    assert all(got[i][0] == alone(*job) for i, job in jobs.items())
    all_pages_back(engine)


@pytest.mark.parametrize("fault", (RuntimeError, KeyboardInterrupt))
def test_faults_lose_nothing(folder, alone, fault, monkeypatch):
    """Raised before or after any part of a step: the next steps continue with the same tokens."""
    rng = random.Random(3)
    engine = make(folder)
    jobs = submit_many(engine, rng, 12)
    points = [(engine.runner, n) for n in ("decode", "prefill", "decode_and_prefill", "begin", "clear", "move")]
    points += [(engine.runner, "_take_prompts")]
    points += [(engine.scheduler, n) for n in ("vacate", "compact", "admit")] + [(engine.kv, "release")]
    points += [(engine, "_take_result")]
    for owner, name in points:
        real = getattr(owner, name)

        def faulty(*args, real=real):
            if rng.random() < 0.03:
                raise fault("injected before")
            result = real(*args)
            if rng.random() < 0.03:
                raise fault("injected after")
            return result

        monkeypatch.setattr(owner, name, faulty)
    got, faults = {}, 0
    while engine.has_unfinished():
        try:
            outputs = engine.step()
        except fault:
            faults += 1
            continue
        take(outputs, got)
    assert faults > 3
    assert {i: tokens for i, (tokens, _) in got.items()} == {i: alone(*job) for i, job in jobs.items()}
    all_pages_back(engine)


@pytest.mark.parametrize("num_pages", (None, 4))
def test_first_come_first_served(folder, num_pages):
    """This includes the request that needs most pages, while others that need one keep arriving, preempted or not."""
    engine = make(folder, max_batch_size=2, num_pages=num_pages)
    short = SamplingParams(max_new_tokens=12, ignore_eos=True)
    large = SamplingParams(max_new_tokens=240, ignore_eos=True)
    ids = [engine.submit([i + 1] * 5, large if i in (1, 3) else short) for i in range(4)]
    first_seen, ended = [], []
    for _ in range(1000):
        if {ids[1], ids[3]} <= set(ended):
            break
        ids.append(engine.submit([7] * 5, short))
        for out in engine.step():
            if out.request_id not in first_seen:
                first_seen.append(out.request_id)
            if out.finished:
                ended.append(out.request_id)
    assert {ids[1], ids[3]} <= set(ended) and first_seen == ids[: len(first_seen)]
    assert (engine.metrics.preemptions > 0) == (num_pages is not None)


def test_whoever_ends_makes_room_for_the_next_pass(folder):
    """No cycle runs with an empty slot while a request waits for one."""
    engine = make(folder, max_batch_size=3)
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    ids = [engine.submit([i], SamplingParams(60, ignore_eos=True) if i < 2 else params) for i in range(4)]
    told = {}
    while ids[2] not in told or not told[ids[2]].finished:
        told = {out.request_id: out for out in engine.step()}
    assert ids[3] not in told
    told = {out.request_id: out for out in engine.step()}
    assert len(told) == 3 and len(told[ids[3]].new_token_ids) == 1  # its prompt was in the others' cycle


def test_whoever_ends_makes_room_for_a_pass_by_itself(folder):
    engine = make(folder, max_batch_size=1)
    first, second = (engine.submit([i], SamplingParams(max_new_tokens=9, ignore_eos=True)) for i in (1, 2))
    told = {}
    while first not in told or not told[first].finished:
        assert second not in told
        told = {out.request_id: out for out in engine.step()}
    assert second not in told and [len(out.new_token_ids) for out in engine.step()] == [1]  # the token of its prefill


@pytest.mark.parametrize("slots", (1, 2))
def test_where_a_requests_time_went(folder, slots):
    """In the queue, the prefill and decoding, one after the other. With 2 slots and few pages, preemption does not
    count as queue time.
    """
    engine, clock = make(folder, max_batch_size=slots, num_pages=4), time.perf_counter
    start = clock()
    ids = [engine.submit([i], SamplingParams(max_new_tokens=180, ignore_eos=True)) for i in (1, 2)]
    submitted, stats = clock() - start, {}
    while engine.has_unfinished():
        stats |= {out.request_id: out.stats for out in engine.step()}
    whole = clock() - start
    first, second = (stats[i] for i in ids)
    spent = [s.queue_seconds + s.prefill_seconds + s.seconds for s in (first, second)]
    assert first.queue_seconds > 0 and max(spent) < whole
    assert second.preemptions == slots - 1
    if slots == 1:
        assert second.queue_seconds > spent[0] - submitted
    else:
        assert second.queue_seconds < spent[0]


def test_greedy_beside_sampled(folder, alone):
    """Per-request parameters in one batch: coupled requests give what AR gives them alone, rejection is repeatable."""
    engine = make(folder, mode="two_pass")
    greedy = SamplingParams(max_new_tokens=20, ignore_eos=True)
    coupled = SamplingParams(max_new_tokens=20, temperature=0.9, top_k=20, seed=5, ignore_eos=True)
    rejection = dataclasses.replace(coupled, acceptance="rejection")
    outs = engine.generate([[1, 2], [7, 8, 9], [3]], [greedy, coupled, greedy])
    assert [o.token_ids for o in outs] == [alone([1, 2], greedy), alone([7, 8, 9], coupled), alone([3], greedy)]
    want = engine.generate([7, 8, 9], rejection).token_ids
    outs = engine.generate([[1, 2], [7, 8, 9], [7, 8, 9]], [greedy, rejection, coupled])
    assert [o.token_ids for o in outs] == [alone([1, 2], greedy), want, alone([7, 8, 9], coupled)]


def test_a_mode_belongs_to_those_who_run(folder, alone):
    """A caller that finds the engine idle sets the mode; it stays until all running requests have finished."""
    engine = make(folder, mode="two_pass")
    short, long = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (5, 30))
    a, b = engine.stream([1, 2, 3], short, mode="ar"), engine.stream([4, 5], long, mode="ar")
    first = [next(a), next(b)]
    late = engine.submit([8, 9], long)
    with pytest.raises(RuntimeError, match="cannot change while requests run"):
        engine.generate([1], short, mode="two_pass")
    tokens = [t for piece in [first[0], *a] for t in piece.token_ids]
    assert tokens == alone([1, 2, 3], short)
    assert [t for piece in [first[1], *b] for t in piece.token_ids] == alone([4, 5], long)
    assert drain(engine)[late][0] == alone([8, 9], long)
    out = engine.generate([1, 2, 3], long)
    assert out.stats.mode == "two_pass" and out.token_ids == alone([1, 2, 3], long)


def test_calls_from_two_threads_are_refused(folder):
    engine = make(folder)
    inside, leave, errors = threading.Event(), threading.Event(), []
    real = engine.runner.prefill

    def slow(*args):
        inside.set()
        leave.wait(60)
        return real(*args)

    engine.runner.prefill = slow
    worker = threading.Thread(target=lambda: engine.generate([1, 2], SamplingParams(max_new_tokens=2)))
    worker.start()
    assert inside.wait(60)
    for call in (engine.step, engine.explain, engine.memory_report, partial(engine.generate, [3, 4])):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    assert not engine.dropped  # no record of what was never queued, even after a thousand calls
    leave.set()
    worker.join()
    assert errors == ["this engine is in use by another thread; share it through orthrus_rt.AsyncEngine"] * 4


def test_submit_validates_now(folder):
    engine = make(folder)
    with pytest.raises(ValueError, match="at least one token"):
        engine.submit([])
    engine.submit([1], request_id="a")
    with pytest.raises(ValueError, match="request_id must be unused, got 'a' twice"):
        engine.submit([1], request_id="a")
    for _ in range(2):
        engine.abort("a")
        engine.abort("b")  # it was never there
    (out,) = engine.step()
    assert out.finished and out.finish_reason == "abort" and not engine.has_unfinished()
    engine.abort("a")
    assert engine.metrics.finished["abort"] == 1 and engine.step() == []
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.submit([1])


def test_limits_of_the_constructor(folder):
    with pytest.raises(ValueError, match=r"num_pages must be >= 4 \(one sequence of 256\), got 3"):
        make(folder, num_pages=3)
    with pytest.raises(ValueError, match="max_batch_size must be >= 1, got 0"):
        make(folder, max_batch_size=0)


def test_buckets_are_powers_of_two_and_all():
    assert [batch_buckets(n) for n in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9]]
    assert batch_buckets(37) == sorted({batch_bucket(size, 37) for size in range(1, 38)})
    assert len(batch_buckets(10**30)) == 101


def test_warmup_changes_nothing(folder, alone):
    engine = make(folder)
    engine.warmup()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    assert engine.generate([1, 2], params).token_ids == alone([1, 2], params)


def test_who_moves_to_a_lower_slot_takes_its_drafts_along(folder):
    """A batch whose lower slots become free accepts for each of its sequences what that accepts alone."""
    engine = make(folder, mode="one_pass", max_batch_size=8)
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    params = [SamplingParams(3 + 5 * i, ignore_eos=True) for i in range(8)]
    together = engine.generate(prompts, params)
    alone = [engine.generate(*job) for job in zip(prompts, params, strict=True)]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [(o.stats.accepted, o.stats.misses) for o in together] == [(o.stats.accepted, o.stats.misses) for o in alone]


def test_those_who_go_on_hold_the_lowest_slots(folder):
    """A cycle is as large as its highest slot, and no more sequences move than have to."""
    engine = make(folder)
    ids = [engine.submit([i], SamplingParams(max_new_tokens=50, ignore_eos=True)) for i in range(4)]
    engine.step()
    engine.abort(ids[1])
    engine.step()
    assert [r.slot for r in engine.scheduler.active] == [0, 2, 1]


def test_options_of_a_mode_belong_to_those_who_run_too(folder):
    engine = make(folder, mode="two_pass")
    stream = engine.stream([1, 2, 3], SamplingParams(max_new_tokens=30, ignore_eos=True))
    next(stream)
    with pytest.raises(RuntimeError, match=r"cannot change while requests run \(now two_pass/7, asked two_pass/3\)"):
        engine.generate([1], draft_len=3)
    assert engine.generate([1], draft_len=7).finish_reason


def test_cycles_are_no_larger_than_who_runs_asks_for(folder):
    """In slots, and in what is done to logits."""
    engine = make(folder, mode="ar")
    for how in ({}, {"frequency_penalty": 0.5}, {"temperature": 0.8, "seed": 1}):
        engine.generate([1, 2], SamplingParams(4, ignore_eos=True, **how))
    made = [(slots, scored, edited) for _, slots, scored, edited in engine.runner._cycles]
    assert made == [(1, False, False), (1, True, True), (1, True, False)]


def test_cycles_that_callers_vary_are_not_all_kept(folder, monkeypatch):
    """The last used ones are kept, and what is recorded anew yields the same tokens in as many cycles."""
    monkeypatch.setattr("orthrus_rt.runner.MAX_RECORDINGS", 3)
    engine = make(folder, mode="two_pass")
    params = SamplingParams(9, ignore_eos=True)
    made = {n: weakref.ref(engine.runner.cycle(CyclePlan("two_pass", n + 1), 1)) for n in (1, 2, 3)}
    outs = [engine.generate([1, 2], params, draft_len=n) for n in (1, 4, 5, 1, 6)]
    assert [plan.block_len - 1 for plan, *_ in engine.runner._cycles] == [5, 1, 6]
    assert [n for n, cycle in made.items() if cycle() is not None] == [1]
    again = engine.generate([1, 2], params, draft_len=4)
    assert again.token_ids == outs[0].token_ids == outs[1].token_ids and again.stats.cycles == outs[1].stats.cycles


def test_cycles_that_draft_nothing_ahead_miss_nothing(folder):
    engine = make(folder)
    for mode in ("ar", "two_pass"):
        assert engine.generate([1, 2], SamplingParams(9, ignore_eos=True), mode=mode).stats.misses == 0
