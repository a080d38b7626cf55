"""Pages of a common beginning are shared and found again: the same bits with less prefill, and off means off.

On a tiny bf16 model; the oracle is an engine that finds nothing.
"""

import random
from functools import partial

import pytest
import torch

from orthrus_rt.kv import OutOfPages
from orthrus_rt.pages import PagePool, page_names
from orthrus_rt.prefill import PrefillPass
from orthrus_rt.runner import Runner
from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.traces import assert_same, decode, digest, few_pages

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

VOCAB = 96
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.8, seed=3, repetition_penalty=1.2)
make = partial(engines.make, max_seq_len=512, max_batch_size=4)


@pytest.fixture(scope="module")
def forgetful(folder):
    """An engine without prefix caching."""
    return make(folder, prefix_caching=False)


def decoded(out):
    """Tokens, and the cycles that they took: a drafter that misreads shared pages is only slow."""
    return out.token_ids, out.stats.cycles


def text(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


@pytest.mark.parametrize("params", (GREEDY, SAMPLED), ids=("greedy", "sampled"))
@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass"))
def test_a_conversation_goes_on_where_it_was(folder, forgetful, mode, params):
    """Turn by turn, prompts and answers are found, whatever mode computed them: tokens, logits and cache to the bit."""
    engine, history = make(folder), []
    for turn, new in enumerate((108, 1, 200, 64)):  # the first answer ends at 128
        length, before = len(history), engine.metrics.cached_tokens
        history += text(new, seed=turn)
        (trace,) = decode(engine, [history], params, mode=mode)
        assert_same([trace], decode(forgetful, [history], params, mode="ar"), turn)
        in_cache = max(0, length - 1)  # all but the last token of an answer, which no pass took in
        assert engine.metrics.cached_tokens - before == in_cache // 64 * 64
        history += trace.tokens
        assert engine.kv.num_free_pages == engine.kv.num_pages


def test_penalties_count_what_was_found_and_what_came_in_chunks(folder, forgetful, monkeypatch):
    want = decode(forgetful, [text(300)], SAMPLED, mode="ar")
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 48)
    engine = make(folder)
    engine.generate(text(130), SAMPLED, mode="two_pass")
    assert_same(decode(engine, [text(300)], SAMPLED, mode="two_pass"), want, "of whose beginning some is there")
    assert engine.metrics.cached_tokens == 128


def test_the_last_token_of_a_prompt_is_always_computed(folder, forgetful):
    """Its row gives the first token of the answer."""
    engine = make(folder)
    for length, cached in ((128, 0), (128, 64), (129, 128), (63, 0), (64, 0), (65, 64)):
        out = engine.generate(text(length), GREEDY)
        assert out.stats.cached_tokens == cached and out.stats.prompt_tokens == length
        assert decoded(out) == decoded(forgetful.generate(text(length), GREEDY))


def test_one_pass_fills_pages_and_reads_them(folder, forgetful):
    """Prompts that arrive together share what the first of them adds, in the pass that computes it."""
    engine = make(folder)
    prompts = [[*text(130), i] for i in range(4)]
    outs = engine.generate(prompts, GREEDY)
    assert list(map(decoded, outs)) == [decoded(forgetful.generate(p, GREEDY)) for p in prompts]
    assert [out.stats.cached_tokens for out in outs] == [0, 128, 128, 128]
    facts = engine.metrics.as_dict()
    assert (facts["prompt_tokens"], facts["cached_tokens"], facts["recomputed_tokens"]) == (4 * 131, 3 * 128, 0)
    assert facts["times"]["prefill"]["count"] == 1
    assert "orthrus_cached_tokens_total 384" in engine.metrics.as_prometheus()


def test_shared_pages_are_held_once(folder):
    """Two sequences of eight pages, six of them shared, run at once on ten pages."""
    engine = make(folder, num_pages=10)
    ids = [engine.submit(text(6 * 64) + [i] * 64, GREEDY) for i in range(2)]
    engine.step()
    assert [r.request_id for r in engine.scheduler.active] == ids
    assert engine.kv.num_free_pages == 0
    table = engine.kv.page_table[:2, :8]
    assert torch.equal(table[0, :6], table[1, :6]) and len(set(table.flatten().tolist())) == 10
    engine.abort(ids[0])  # the other one keeps the shared pages
    assert engine.kv.num_free_pages == 2
    engine.abort(ids[1])
    assert engine.kv.num_free_pages == 10 and bool((engine.kv.page_table == 0).all())


def test_whoever_lost_its_pages_finds_what_is_left_of_them(folder, forgetful):
    engine = make(folder)
    params = SamplingParams(max_new_tokens=150, ignore_eos=True)
    prompts = [text(100, seed=i) for i in range(4)]
    with few_pages(engine, 11):
        outs = engine.generate(prompts, params)
    assert [out.token_ids for out in outs] == [forgetful.generate(p, params).token_ids for p in prompts]
    assert engine.metrics.preemptions > 0 and engine.metrics.cached_tokens > 0
    assert engine.metrics.prompt_tokens == 400
    assert all(out.stats.cached_tokens == 0 for out in outs)


def test_pages_named_before_a_failing_pass_are_forgotten(folder, forgetful, monkeypatch):
    """They were never written: a prefill pass names what it is about to compute."""
    engine = make(folder)
    with monkeypatch.context() as patch:
        patch.setattr(PrefillPass, "run", lambda _: (_ for _ in ()).throw(RuntimeError("injected")))
        engine.kv.pages.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="injected"):
            engine.generate(text(200), GREEDY)
    out = engine.generate(text(200), GREEDY)
    assert out.stats.cached_tokens == engine.metrics.cached_tokens == 0
    assert out.token_ids == forgetful.generate(text(200), GREEDY).token_ids


@pytest.mark.parametrize(("owner", "where"), ((Runner, "begin"), (PrefillPass, "run")))
def test_a_request_without_memory_beside_some_that_share(folder, forgetful, monkeypatch, owner, where):
    """It ends alone, and what it or requests before it named but did not write is forgotten."""
    engine, calls = make(folder), []
    real = getattr(owner, where)

    def exhausted(*args):
        calls.append(None)
        if len(calls) == (3 if where == "begin" else 1):
            raise torch.OutOfMemoryError("injected")
        return real(*args)

    monkeypatch.setattr(owner, where, exhausted)
    engine.kv.pages.fill_(torch.nan)
    prompts = [[*text(130), i] for i in range(4)]
    outs = engine.generate(prompts, GREEDY)
    assert sorted(out.finish_reason for out in outs) == ["error", "length", "length", "length"]
    for out, prompt in zip(outs, prompts, strict=True):
        assert out.error or out.token_ids == forgetful.generate(prompt, GREEDY).token_ids
    named = list(engine.kv.pool._page_of.values())
    assert named and not bool(engine.kv.pages[:, :, named].isnan().any())
    assert engine.kv.num_free_pages == engine.kv.num_pages


@pytest.mark.parametrize(("how", "backend"), (({"dtype": "float16"}, ""), ({}, "dual_attn=reference")))
def test_nothing_is_found_where_bits_depend_on_the_pass(folder, monkeypatch, how, backend):
    monkeypatch.setenv("ORTHRUS_BACKEND", backend)
    engine = make(folder, **how)
    for _ in range(2):
        assert engine.generate(text(130), SamplingParams(max_new_tokens=2)).stats.cached_tokens == 0


def test_it_stays_on_where_logits_are_processed_by_the_reference(folder, monkeypatch):
    monkeypatch.setenv("ORTHRUS_BACKEND", "process_logits=reference")
    engine = make(folder)
    stats = [engine.generate(text(130), SamplingParams(max_new_tokens=2)).stats for _ in range(2)]
    assert [s.cached_tokens for s in stats] == [0, 128]


def test_off_means_off(forgetful):
    for _ in range(2):
        assert forgetful.generate(text(200), GREEDY).stats.cached_tokens == 0
    assert forgetful.metrics.cached_tokens == 0
    assert not forgetful.kv.pool._page_of


@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass"))
def test_a_name_stands_for_one_content(folder, forgetful, mode):
    """Whatever request computed a page, alone or with others, in prefill or decoding, before or after the page was
    given away: the same name always stands for the same bits, and nothing is written to a page that has a name.
    """
    engine = make(folder, num_pages=14, mode=mode)
    rng, todo, content, jobs, got = random.Random(mode), 40, {}, {}, {}
    trunks = [text(n, seed=n) for n in (64, 130, 200)]
    while todo or engine.has_unfinished():
        if todo and rng.random() < 0.3:
            prompt = rng.choice(trunks) + text(rng.randrange(3) * 50, seed=rng.randrange(3)) + [rng.randrange(9)]
            params = SamplingParams(rng.randint(1, 90), ignore_eos=True)
            jobs[engine.submit(prompt, params)] = prompt, params
            todo -= 1
        for out in engine.step():
            got.setdefault(out.request_id, []).extend(out.new_token_ids)
        for name, page in engine.kv.pool._page_of.items():
            held = digest(engine.kv.pages[:, :, page])
            assert content.setdefault(name, held) == held
    assert engine.metrics.preemptions > 0
    assert len(content) > engine.kv.num_pages and engine.metrics.cached_tokens > 64 * len(jobs)
    for request_id, (prompt, params) in jobs.items():
        assert got[request_id] == forgetful.generate(prompt, params, mode="ar").token_ids


def test_the_pool_takes_what_nobody_needs_first():
    pool = PagePool(range(1, 6))
    a, b = pool.take(2), pool.take(2)
    assert (a, b, pool.num_free) == ([1, 2], [3, 4], 1)
    for page, name in zip(a + b, (b"a1", b"a2", b"b1", b"b2"), strict=True):
        pool.name(page, name, b"first")
    pool.give_back(a)
    pool.give_back(b)
    assert pool.num_free == 5 and [pool.find(n) for n in (b"a1", b"a2", b"b1", b"b2")] == [1, 2, 3, 4]
    assert pool.take(1) == [5]  # it held nothing
    pool.hold([1])  # found again
    assert pool.take(2) == [2, 4]  # the longest free ones; the end of a text before its beginning
    assert pool.num_free == 1 and [pool.find(n) for n in (b"a1", b"a2", b"b1", b"b2")] == [1, None, 3, None]
    pool.hold([1])
    pool.give_back([1])
    assert pool.num_free == 1
    pool.give_back([1])
    assert pool.num_free == 2 and pool.take(2) == [3, 1]


def test_of_equal_pages_the_first_keeps_the_name():
    pool = PagePool(range(1, 4))
    pages = pool.take(2)
    for page in pages:
        pool.name(page, b"same", b"first")
    assert pool.find(b"same") == 1
    pool.give_back(pages)
    assert pool.take(2) == [2, 3] and pool.find(b"same") == 1


def test_a_slot_that_cannot_be_opened_changes_nothing(folder):
    engine = make(folder, num_pages=8)
    kv = engine.kv
    engine.generate(text(130), GREEDY)
    kv.reserve(0, 4 * 64)
    before, names = (kv.num_free_pages, dict(kv.pool._page_of)), page_names(text(130), [])
    with pytest.raises(OutOfPages, match="slot 1 needs 3 more pages for 300 tokens, 2 are free"):
        kv.open(1, names, 300)
    assert (kv.num_free_pages, dict(kv.pool._page_of)) == before
    assert kv.open(1, names, 256) == 128


def test_names_tell_all_tokens_so_far():
    tokens = text(200)
    names = page_names(tokens, [])
    assert len(set(names)) == 3 and page_names(tokens, names[:1]) == names
    assert page_names(tokens[:192], []) == names and page_names(tokens[:191], []) == names[:2]
    for changed in (0, 63, 64, 191):
        other = page_names([*tokens[:changed], tokens[changed] + 1, *tokens[changed + 1 :]], [])
        assert [a == b for a, b in zip(names, other, strict=True)] == [i < changed // 64 for i in range(3)]


def test_a_prompt_that_ended_half_way_leaves_what_was_computed(folder, forgetful, monkeypatch):
    """And no more: the pages after that may contain anything."""
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 64)
    engine = make(folder)
    engine.kv.pages.fill_(torch.nan)
    request_id = engine.submit(text(300), GREEDY)
    engine.step()
    engine.abort(request_id)
    engine.step()
    out = engine.generate(text(300), GREEDY)
    assert out.token_ids == forgetful.generate(text(300), GREEDY).token_ids and out.stats.cached_tokens == 64


@pytest.mark.parametrize("ended", (False, True))
def test_nothing_behind_doubtful_pages_is_found_under_a_name(folder, ended):
    """Slot 1 computed the third page after two pages of slot 0 in which a NaN turned up, and may have ``ended`` before
    that. Those two pages are computed anew.
    """
    kv, names = make(folder, max_seq_len=256, max_batch_size=3).kv, page_names(text(192), [])
    kv.open(0, [], 128)
    kv.publish(0, names[:2])
    assert kv.open(1, names, 192) == 128
    kv.publish(1, names)
    if ended:
        kv.release(1)
    kv.withdraw(0, names[:2])
    kv.release(0)
    if not ended:
        kv.release(1)
    assert kv.open(2, names, 128) == 0
    kv.publish(2, names[:2])
    assert kv.open(0, names, 192) == 128 and kv.num_free_pages == kv.num_pages - 3


def test_what_begins_otherwise_stays(folder):
    kv, names, other = make(folder, max_seq_len=256).kv, page_names(text(192), []), page_names([7] * 192, [])
    for known in (names, other):
        kv.open(0, [], 192)
        kv.publish(0, known)
        kv.release(0)
    assert kv.open(0, names, 192) == 192
    kv.withdraw(0, names)
    kv.release(0)
    assert kv.open(0, names, 192) == 0 and kv.open(1, other, 192) == 192


def test_whoever_lost_its_pages_finds_those_of_its_answer_too(folder, forgetful):
    engine, told = make(folder), {}
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    request_id = engine.submit([1, 2, 3], params)
    (request,) = engine.scheduler.unfinished
    while request.length < 140:
        engines.take(engine.step(), told)
    with torch.inference_mode():
        engine._preempt(request)
    engines.take(engine.step(), told)
    assert engine.metrics.cached_tokens == 128
    assert engines.drain(engine, told)[request_id] == (forgetful.generate([1, 2, 3], params).token_ids, "length")


def test_what_is_computed_behind_doubtful_pages_gets_no_name(folder):
    kv, names = make(folder).kv, page_names([7] * 192, [])
    kv.open(0, [], 128), kv.publish(0, names[:2])
    assert kv.open(1, names[:2], 128) == 128
    kv.withdraw(0, names[:2]), kv.reserve(1, 192), kv.publish(1, names)
    assert [kv.pool.find(name) for name in names] == [None] * 3


def test_what_others_hold_that_begins_otherwise_stays(folder):
    kv, names, other = make(folder).kv, page_names([3] * 128, []), page_names([7] * 128, [])
    for slot, known in enumerate((names, other)):
        kv.open(slot, [], 128), kv.publish(slot, known)
    kv.withdraw(0, names)
    assert kv.open(2, names, 128) == 0 and kv.open(3, other, 128) == 128


def test_nothing_is_found_behind_a_page_that_is_gone(folder):
    """Slot 1's second page is there. The name of its first one belonged to slot 0's, which was reused."""
    kv, names = make(folder, max_seq_len=256, num_pages=4).kv, page_names(text(128), [])
    kv.open(0, [], 64), kv.publish(0, names[:1])
    kv.open(1, [], 128), kv.publish(1, names)
    kv.release(0), kv.open(2, [], 128), kv.release(2)
    assert kv.pool.find(names[0]) is None and kv.pool.find(names[1]) is not None
    assert kv.open(3, names, 128) == 0
