"""Recorded prefill passes, as on CUDA: few shapes, padded with rows that touch nothing, and replayed."""

from functools import partial

import pytest
import torch

from orthrus_rt import ops
from orthrus_rt.prefill import PrefillPass, PrefillShape, prefill_rows
from orthrus_rt.rows import Layout, empty_rows
from orthrus_rt.sampling import SamplingParams
from tests import engines, lossless
from tests.failing import exhausted
from tests.traces import assert_same, decode

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

GREEDY = SamplingParams(6, ignore_eos=True)
JOBS = [
    ([1, 2, 3], GREEDY),
    ([4] * 70, SamplingParams(6, temperature=0.8, seed=1, ignore_eos=True)),
    ([5, 6], SamplingParams(6, temperature=0.7, seed=3, frequency_penalty=0.5, logit_bias={5: 1.0}, min_tokens=6)),
    ([7] * 200, GREEDY),
    ([8, 9], SamplingParams(6, temperature=0.8, seed=2, ignore_eos=True, acceptance="rejection")),
]


@pytest.fixture
def make(folder):
    return partial(engines.make, folder, max_seq_len=256, max_batch_size=4, prefix_caching=False)


@pytest.mark.parametrize(
    ("rows", "groups", "tallest", "chosen", "want"),
    [
        (1, 1, 1, 1, (16, 2, 16, 6)),
        (16, 3, 9, 0, (16, 5, 16, 0)),
        (17, 1, 17, 0, (32, 2, 32, 0)),
        (128, 6, 30, 5, (128, 9, 32, 6)),
        (129, 5, 60, 1, (256, 9, 128, 6)),  # the padding is a group too, of 127 rows
        (300, 1, 300, 1, (384, 2, 384, 6)),
        (390, 1, 390, 1, (400, 2, 400, 6)),
        (1000, 2, 999, 0, (1000, 3, 1000, 0)),
    ],
)
def test_few_shapes(rows, groups, tallest, chosen, want):
    """No more rows than there are buffers for, unless they are asked for, and no more rows that choose than slots."""
    want_rows, want_groups, want_tallest, want_chosen = want
    got = PrefillShape(rows, groups, tallest, chosen, False).padded(400, num_slots=6)
    assert got == PrefillShape(want_rows, want_groups, want_tallest, want_chosen, False)


def test_fewer_shapes_in_a_cycle():
    """Whether or not any of the prompts ends, and however long each is."""
    shapes = [PrefillShape(20, 2, tallest, chosen, False) for tallest, chosen in ((10, 0), (19, 1), (12, 2))]
    assert {shape.padded(400, 6, in_cycle=True) for shape in shapes} == {PrefillShape(32, 3, 32, 6, False)}
    assert PrefillShape(9, 9, 1, 9, False).padded(9, 40, in_cycle=True).chosen == 9  # one row each


def test_padding_and_replays_change_no_bit(make, monkeypatch):
    """Greedy, sampled, edited and by rejection, alone and together, in any chunks: the same tokens, logits, cache."""
    prompts, params = (list(column) for column in zip(*JOBS, strict=True))
    kinds = [i for i, p in enumerate(params) if p.acceptance == "coupled"]
    alone = decode(make(False), [prompts[i] for i in kinds], [params[i] for i in kinds])
    rejection = make(False).generate(*JOBS[-1]).token_ids
    cycles = [make(False).generate(*job).stats.cycles for job in JOBS]
    for chunk in (512, 100, 7):
        monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", chunk)
        engine = make(True)
        for together in (False, True, True):
            got = decode(engine, [prompts[i] for i in kinds], [params[i] for i in kinds], together=together)
            assert_same(got, alone, (chunk, together))
        outs = engine.generate(prompts, params)
        assert [outs[i].token_ids for i in kinds] == [trace.tokens for trace in alone]
        assert outs[-1].token_ids == rejection
        assert [out.stats.cycles for out in outs] == cycles
        assert any(known.settled for known in engine.runner._with_prompts.values())


def test_as_many_choose_as_there_are_slots(make):
    """Their number is not rounded up to a power of two, and no row of logits is added."""
    params = lossless.sampled(6, max_new_tokens=4, ignore_eos=True)
    prompts = [[i, i + 1] for i in range(6)]
    want = decode(make(False, mode="ar", max_batch_size=6), prompts, params, together=True)
    engine = make(True, mode="ar", max_batch_size=6)
    for _ in range(3):
        assert_same(decode(engine, prompts[:5], params[:5], together=True), want[:5])
        assert_same(decode(engine, prompts, params, together=True), want)


def test_prefix_caching(make):
    """Pages that one prompt of a pass fills and another prompt reads in the same pass."""
    prompts = [[*range(90), *range(60), i] for i in range(4)]
    want = decode(make(False), prompts, GREEDY)
    engine = make(True, prefix_caching=True)
    for _ in range(3):
        assert_same(decode(engine, prompts, GREEDY, together=True), want)
    assert engine.metrics.cached_tokens == 11 * 128


def test_padding_touches_nothing(make):
    engine = make(True)
    engine.kv.pages.fill_(torch.nan)
    engine.generate([[1] * 5, [2] * 4], SamplingParams(1, ignore_eos=True))
    (known,) = engine.runner._with_prompts.values()
    assert known.shape == PrefillShape(16, 3, 16, 4, False)
    written = ~engine.kv.pages[0, :, 1:].isnan().all(4).all(2)  # [keys and values, page, slot of the page]
    assert sorted(int(n) for n in written[0].sum(1) if n) == [4, 5] and torch.equal(written[0], written[1])


def test_the_third_pass_of_a_shape_runs_no_python_per_op(make, monkeypatch):
    """First it runs op by op, then while it is recorded, then as replays; every shape by itself."""
    engine, calls, real = make(True), [], ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda *args: calls.append(args) or real(*args))
    per_pass = 2 * engine.config.num_layers + 1
    for prompt, want in (([1] * 9, 1), ([2] * 16, 2), ([3] * 12, 2), ([4] * 17, 3), ([5] * 3, 3), ([6] * 32, 4)):
        engine.generate(prompt, SamplingParams(1, ignore_eos=True))
        assert len(calls) == want * per_pass
    assert len(engine.runner._with_prompts) == 2
    assert engine.memory_report()["cycles"] >= sum(known.nbytes for known in engine.runner._with_prompts.values()) > 0


def test_a_recording_that_finds_no_memory(make, monkeypatch):
    engine = make(True)
    want = make(False).generate([1, 2, 3], GREEDY).token_ids

    monkeypatch.setattr(PrefillPass, "make_recording", exhausted)
    assert engine.generate([1, 2, 3], GREEDY).token_ids == want
    with pytest.warns(UserWarning, match="recording the prefill of 16 rows: lower max_batch_size.*op by op, slower"):
        assert engine.generate([1, 2, 3], GREEDY).token_ids == want
    assert engine.generate([1, 2, 3], GREEDY).token_ids == want


def test_a_pass_that_failed_has_warmed_nothing_up(make, monkeypatch):
    engine = make(True)
    with monkeypatch.context() as patch:
        patch.setattr(PrefillPass, "run_eager", lambda _: (_ for _ in ()).throw(RuntimeError("injected")))
        with pytest.raises(RuntimeError, match="injected"):
            engine.generate([1, 2, 3], GREEDY)
    assert not any(known.settled for known in engine.runner._with_prompts.values())
    engine.generate([1, 2, 3], GREEDY)
    assert not any(known.settled for known in engine.runner._with_prompts.values())
    engine.generate([1, 2, 3], GREEDY)
    assert all(known.settled for known in engine.runner._with_prompts.values())


def test_larger_cycles_drop_what_knew_the_old_buffers(make):
    engine = make(True, max_seq_len=128, max_batch_size=2)
    for _ in range(3):
        want = engine.generate([1, 2, 3], GREEDY).token_ids
    before = engine.runner.activations
    engine.generate([1, 2, 3], GREEDY, mode="one_pass", fan_out=22)
    assert engine.runner.activations is not before
    assert all(known.activations is engine.runner.activations for known in engine.runner._with_prompts.values())
    assert [engine.generate([1, 2, 3], GREEDY).token_ids for _ in range(3)] == [want] * 3


def test_no_more_are_kept_than_some(make, monkeypatch):
    """Those used last are kept."""
    monkeypatch.setattr("orthrus_rt.runner.MAX_RECORDINGS", 2)
    engine = make(True)
    for length in (3, 20, 3, 40):
        engine.generate([1] * length, GREEDY)
    assert [shape.rows for (shape,) in engine.runner._with_prompts] == [16, 64]


def test_a_warm_up_records_the_prompts_by_themselves(make, monkeypatch):
    """On rows none of which is valid, so that nothing is written."""
    engine = make(True)
    engine.kv.pages.fill_(torch.nan)
    engine.warmup()
    assert bool(engine.kv.pages[:, :, 1:].isnan().all())
    assert [shape.rows for (shape,) in engine.runner._with_prompts] == [16, 32, 64, 128, 256, 384, 512, 512]
    prompts = [[5] * 3, [6] * 70, [7] * 200]
    want = [make(False).generate(prompt, GREEDY).token_ids for prompt in prompts]
    monkeypatch.setattr("orthrus_rt.prefill.forward", None)  # nothing runs op by op
    assert [engine.generate(prompt, GREEDY).token_ids for prompt in prompts] == want


def test_the_whole_promise(make, monkeypatch):
    lossless.check_prefill(make(True, num_pages=24, max_batch_size=6), monkeypatch)


def test_every_array_of_rows_begins_at_a_multiple_of_16_bytes():
    """Triton compiles a kernel again for pointers that do not."""
    for rows in (prefill_rows([([1, 2, 3], 0, 0)], "cpu"), empty_rows(Layout(1, 3, 2, 3), "cpu")):
        arrays = (rows.token, rows.position, rows.seq, rows.prefix_len, rows.group_start)
        assert [array.data_ptr() % 16 for array in arrays] == [0] * 5
