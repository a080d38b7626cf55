"""Triton kernels on the GPU: against the oracle, the same bits whatever shares the pass, and under a graph."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from orthrus_rt.state import empty_partials, num_score_tiles
from orthrus_rt.triton_kernels import count_tokens, embed, process_logits, rms_norm, sum_words
from tests import large_logits
from tests.attention_pass import Heads, assert_close, check_weights_are_rounded_for_their_products_alone
from tests.logits_cases import (
    FILTERS,
    assert_agrees,
    block_with_edits,
    check_count_tokens,
    check_draws,
    check_ids_outside,
    check_neighbouring_values,
    check_the_outermost_uniforms,
    check_the_unlikely,
    check_what_top_k_keeps,
    logits,
    moved,
    with_filters,
)
from tests.rms_norm_cases import check_rms_norm
from tests.rows import ar, diff
from tests.triton_pass import TritonPass

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_graph(run):
    """Captures ``run`` once, after a warm-up that compiles; returns the replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 576, 2048, 2560, 4096])
def test_rms_norm(hidden, dtype):
    check_rms_norm(rms_norm.rms_norm, hidden, dtype, "cuda")
    x = torch.randn(33, hidden, device="cuda").to(dtype) * 3
    weight = torch.randn(hidden, device="cuda")
    index = torch.randint(0, 33, (50,), device="cuda", dtype=torch.int32)
    got = torch.empty_like(x)
    picked, one = torch.empty(50, hidden, device="cuda", dtype=dtype), torch.empty_like(x[:1])
    rms_norm.rms_norm(x, weight, 1e-6, got)
    rms_norm.rms_norm(x, weight, 1e-6, picked, index)
    rms_norm.rms_norm(x[7:8], weight, 1e-6, one)
    torch.cuda.synchronize()
    assert torch.equal(picked, got[index.long()])
    assert torch.equal(one[0], got[7])


def test_chain_of_dependent_launches_under_a_graph():
    """Kernels that may start early (programmatic dependent launch) still see all that earlier kernels wrote."""
    table = torch.randn(1000, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(4096, device="cuda") + 0.5
    token = torch.zeros(40, device="cuda", dtype=torch.int32)
    x, y = torch.empty(2, 40, 4096, device="cuda", dtype=torch.bfloat16)

    def run():
        embed.embed(token, table, x)
        for _ in range(20):
            rms_norm.rms_norm(x, weight, 1e-6, y)
            rms_norm.rms_norm(y, weight, 1e-6, x)

    replay = on_graph(run)
    for seed in range(20):
        token.copy_(torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(seed)))
        replay()
        got = x.clone()
        torch.cuda.synchronize()
        x.fill_(torch.nan)
        embed.embed(token, table, x)
        torch.cuda.synchronize()
        for _ in range(20):
            rms_norm.rms_norm(x, weight, 1e-6, y)
            torch.cuda.synchronize()
            rms_norm.rms_norm(y, weight, 1e-6, x)
            torch.cuda.synchronize()
        assert torch.equal(got, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype):
    table = torch.randn(500, 2050, device="cuda").to(dtype)
    token = torch.randint(0, 500, (70,), device="cuda", dtype=torch.int32)
    out = torch.empty(70, 2050, device="cuda", dtype=dtype)
    embed.embed(token, table, out)
    assert torch.equal(out, table[token.long()])


def test_embed_64_bit_offsets():
    table = torch.zeros(600_000, 4096, device="cuda", dtype=torch.bfloat16)  # 2.46e9 elements
    table[599_999] = 3
    out = torch.empty(1, 4096, device="cuda", dtype=torch.bfloat16)
    embed.embed(torch.tensor([599_999], device="cuda", dtype=torch.int32), table, out)
    assert (out == 3).all()


def test_sum_words():
    x = torch.randint(-(2**31), 2**31, (200_000,), device="cuda", dtype=torch.int32)
    out = torch.empty(sum_words.num_sums(200_000), device="cuda", dtype=torch.int32)
    sum_words.sum_words(x, out)
    assert out.tolist() == [int(part.sum(dtype=torch.int32)) for part in x.split(65_536)]


PASSES = {
    "decode": [ar(0, 1000, 1), ar(1, 63, 1), ar(2, 64, 1), ar(3, 0, 1), ar(4, 5000, 1)],
    "one_pass": [ar(0, 1500, 32), diff(0, 1510, 32), diff(0, 1532, 32), ar(1, 40, 32), diff(1, 41, 32, invalid=30)],
    "long_block": [diff(0, 70, 100), diff(1, 10, 3), diff(2, 0, 16)],
    "prefill": [ar(0, 0, 500), ar(1, 129, 77)],
    "padding": [ar(0, 10, 4, invalid=4), ar(1, 200, 4), diff(2, 10, 4, invalid=4)],
}
HEADS = [Heads(32, 8, 128), Heads(16, 8, 128), Heads(9, 3, 64)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_dual_attn(name, heads):
    case = TritonPass(heads, PASSES[name])
    got = case.run()
    torch.cuda.synchronize()
    assert_close(got, case.expected())
    assert not got[case.rows.position < 0].any()


def test_dual_attn_rounds_weights_for_their_products_alone():
    check_weights_are_rounded_for_their_products_alone(lambda groups: TritonPass(Heads(1, 1, 64), groups))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_dual_attn_rows_do_not_depend_on_company(heads):
    groups = [ar(0, 2000, 16), ar(1, 700, 32), ar(2, 9000, 1), ar(3, 5, 200), diff(0, 2001, 16), diff(1, 705, 32)]
    together = TritonPass(heads, groups)
    want = together.by_group(together.run())
    backwards = TritonPass(heads, groups[::-1])
    got = backwards.by_group(backwards.run())
    for g in groups:
        assert torch.equal(got[g], want[g])
        assert torch.equal(TritonPass(heads, [g]).run(), want[g])
    for i in (0, 7, 15):
        assert torch.equal(TritonPass(heads, [ar(0, 2000 + i, 1)]).run()[0], want[groups[0]][i])


def test_dual_attn_64_bit_offsets():
    case = TritonPass(HEADS[0], [ar(0, 200, 1), diff(0, 200, 16)], first_page=33000)
    assert case.k_pages.numel() > 2**31
    assert torch.equal(case.run(), TritonPass(HEADS[0], case.groups).run())


def test_dual_attn_under_a_graph_reads_lengths_on_the_device():
    case = TritonPass(HEADS[0], [ar(0, 3000, 4), diff(0, 3000, 4)], max_seq_len=4096)
    want = case.run()
    prefix = case.rows.prefix_len.clone()
    case.rows.prefix_len.fill_(1)
    out = torch.empty_like(case.q)
    replay = on_graph(lambda: case.call(out, None))
    case.rows.prefix_len.copy_(prefix)
    replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied", "hostile"])
@pytest.mark.parametrize("vocab", [1, 300, 49152, 151936])
def test_process_logits(vocab, kind):
    assert_agrees(with_filters(logits(6 * len(FILTERS), vocab, kind), device="cuda"), process_logits.process_logits)


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_process_logits_penalties_bias_and_stop_ids(kind):
    case = with_filters(logits(6 * len(FILTERS), 49152, kind), edits=True, device="cuda")
    assert_agrees(case, process_logits.process_logits)


@pytest.mark.parametrize("vocab", (12, 49152))
def test_process_logits_blocks_with_edits(vocab):
    assert_agrees(moved(block_with_edits(vocab, 16), "cuda"), process_logits.process_logits)


def process_logits_from_the_cpu(logits, rows, logit_rows, sampling, cache_seqlens, purpose, partials, *, log_probs):
    args = (moved(x, "cuda") for x in (logits, rows, logit_rows, sampling, cache_seqlens))
    value, index, log_prob = there = [x.to("cuda") for x in (*partials, log_probs)]
    process_logits.process_logits(*args, purpose, (value, index), log_probs=log_prob)
    for x, result in zip((*partials, log_probs), there, strict=True):
        x.copy_(result)


CHECKS = (
    check_ids_outside, check_neighbouring_values, check_what_top_k_keeps, check_the_outermost_uniforms,
    check_the_unlikely,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_process_logits_at_the_edges(check):
    check(process_logits_from_the_cpu)


@pytest.mark.parametrize("kind", ["peaked", "tied"])
def test_process_logits_rows_do_not_depend_on_company(kind):
    case = with_filters(logits(128, 151936, kind), device="cuda")
    together = case.run(process_logits.process_logits)
    order = torch.randperm(128, device="cuda")
    for some in (slice(5, 6), slice(0, 16), slice(37, 53), slice(127, 128), order):
        part = case.only(some).run(process_logits.process_logits)
        assert all(torch.equal(one, all_[some]) for one, all_ in zip(part, together, strict=True))
    value, index = empty_partials(*together[0].shape, "cuda")
    args = case.logits.clone(), case.rows, case.logit_rows, case.sampling, case.cache_seqlens
    process_logits.process_logits(*args, 2, (value, index))
    assert torch.equal(value, together[0]) and torch.equal(index, together[1])


def test_count_tokens():
    check_count_tokens(count_tokens.count_tokens, "cuda")


def test_logits_and_counts_64_bit_offsets(large_card):
    zeros = functools.partial(torch.zeros, device="cuda")
    large_logits.check_process_logits(process_logits.process_logits, zeros, "cuda")
    large_logits.check_count_tokens(count_tokens.count_tokens, zeros, "cuda")


def test_process_logits_under_a_graph():
    """Parameters, seeds and positions are read on the device at every replay."""
    case = with_filters(logits(24, 49152, "peaked"), device="cuda")
    scratch = case.logits.clone()
    partials = empty_partials(24, num_score_tiles(49152), "cuda")

    def run():
        scratch.copy_(case.logits)
        args = scratch, case.rows, case.logit_rows, case.sampling, case.cache_seqlens
        process_logits.process_logits(*args, 1, partials)

    replay = on_graph(run)
    for step in range(5):
        case.rows.position.fill_(step)
        for parameter in (case.sampling.temperature, case.sampling.top_p):
            parameter.copy_(parameter.roll(1))
        replay()
        want_value, want_index, _ = case.run(process_logits.process_logits, purpose=1)
        assert torch.equal(partials[0], want_value) and torch.equal(partials[1], want_index)


def test_process_logits_draws_follow_the_distribution():
    check_draws(process_logits.process_logits, "cuda")
