"""CUDA dual_attn against float64, and its promise: a row's bits depend only on that row's inputs."""

import functools

import pytest
import torch

from orthrus_rt import dispatch
from tests.attention_pass import (
    SHARED_BLOCKS,
    SPOIL,
    Heads,
    Pass,
    assert_close,
    check_a_nan_key_spoils_those_who_see_it_alone,
    check_blocks_read_their_sequence_together,
    check_maxima_that_rise_or_fall_from_one_look_to_the_next,
    check_nan_outlives_the_splits,
    check_scores_of_minus_infinity_have_no_weight,
    check_weights_are_rounded_for_their_products_alone,
)
from tests.rows import ar, diff

pytestmark = pytest.mark.gpu

HEADS = [Heads(32, 8, 128), Heads(16, 8, 128), Heads(8, 8, 128), Heads(9, 3, 64), Heads(16, 2, 64)]
QWEN, SMOL = HEADS[0], HEADS[3]


@pytest.fixture(params=["", "sm80"], autouse=True)
def isa(request, monkeypatch):
    """Both instruction variants."""
    cuda = dispatch.extension().cuda
    with monkeypatch.context() as patch:
        patch.setenv("ORTHRUS_CUDA_ISA", request.param)
        cuda.isa()  # reads it
        yield request.param
    cuda.isa()


PASSES = {
    "decode": [ar(0, 1000, 1), ar(1, 63, 1), ar(2, 64, 1), ar(3, 0, 1), ar(4, 127, 1), ar(5, 5000, 1)],
    "verify": [ar(0, 300, 16), ar(1, 4090, 16, invalid=5)],
    "draft": [diff(0, 0, 16), diff(1, 100, 16), diff(2, 2048, 16, invalid=3)],
    "one_pass": [ar(0, 1500, 32), diff(0, 1510, 32), diff(0, 1532, 32), ar(1, 40, 32), diff(1, 41, 32, invalid=30)],
    "long_block": [diff(0, 70, 100), diff(1, 10, 3)],
    "prefill": [ar(0, 0, 500), ar(1, 129, 77)],
    "long_prefill": [ar(0, 0, 1500), ar(1, 129, 77)],  # more CTAs than SMs for either head_dim
    "padding": [ar(0, 10, 4, invalid=4), ar(1, 200, 4), diff(2, 10, 4, invalid=4)],
}


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_against_float64(name, heads):
    case = Pass(heads, PASSES[name])
    split, fold = case.run(), case.run(split=False)
    torch.cuda.synchronize()
    want = case.expected()
    assert_close(split, want)
    assert torch.equal(split, fold)
    hidden = case.rows.position < 0
    assert not split[hidden].any()


@pytest.mark.parametrize("heads", [QWEN, SMOL], ids=str)
def test_rows_do_not_depend_on_company(heads):
    """A group has the same bits alone, in other passes, and in any order of groups."""
    groups = [ar(0, 2000, 1), diff(0, 2001, 16), ar(1, 700, 32), diff(1, 705, 32), ar(2, 9000, 1), ar(3, 5, 16)]
    together = Pass(heads, groups)
    want = together.by_group(together.run())
    reversed_pass = Pass(heads, groups[::-1], max_seq_len=20000)
    for got in (reversed_pass.by_group(reversed_pass.run()), reversed_pass.by_group(reversed_pass.run(split=False))):
        assert all(torch.equal(got[g], want[g]) for g in groups)
    crowd = [ar(10 + i, 37 * i, 1 + i % 3) for i in range(70)]
    crowded = Pass(heads, groups + crowd)
    got = crowded.by_group(crowded.run())
    for g in groups:
        alone = Pass(heads, [g])
        assert torch.equal(alone.run(), want[g])
        assert torch.equal(got[g], want[g])


@pytest.mark.parametrize("heads", [QWEN, SMOL], ids=str)
def test_a_nan_key_spoils_those_who_see_it_alone(heads):
    check_a_nan_key_spoils_those_who_see_it_alone(lambda groups: Pass(heads, groups))


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("heads", [QWEN, SMOL], ids=str)
def test_nan_outlives_the_splits(heads, spoil):
    check_nan_outlives_the_splits(lambda groups: Pass(heads, groups), spoil)


@pytest.mark.parametrize("heads", [QWEN, SMOL], ids=str)
def test_scores_of_minus_infinity_have_no_weight(heads):
    check_scores_of_minus_infinity_have_no_weight(lambda groups: Pass(heads, groups))


@pytest.mark.parametrize("heads", [QWEN, SMOL], ids=str)
def test_verify_rows_equal_decode_rows(heads):
    """Row i of a verification has the same bits as AR decoding at that position: 1 row against 16 and 128."""
    for n in (16, 128):
        start = 1020
        block = Pass(heads, [ar(0, start, n)])
        want = block.run()
        for i in (0, 3, n // 2, n - 1):
            one = Pass(heads, [ar(0, start + i, 1)])
            assert torch.equal(one.run()[0], want[i]), i


@pytest.mark.parametrize("heads", [QWEN, SMOL], ids=str)
def test_prefill_chunks(heads):
    """Chunks of any size give the same bits."""
    length = 600
    whole = Pass(heads, [ar(0, 0, length)])
    want = whole.run()
    for size in (1, 7, 64, 500):
        first = 512 if size == 1 else 0
        for start in range(first, length, size):
            chunk = Pass(heads, [ar(0, start, min(size, length - start))])
            assert torch.equal(chunk.run(), want[start : start + size]), (size, start)


def test_last_page_and_longest_context():
    case = Pass(QWEN, [ar(0, 40959, 1), diff(0, 40928, 32), ar(1, 40895, 1)])
    assert case.max_seq_len == 40960 and case.page_table.shape[1] == 640
    got = case.run()
    assert_close(got, case.expected())
    assert torch.equal(got, case.run(split=False))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_maxima_that_rise_or_fall_from_one_look_to_the_next(head_dim):
    check_maxima_that_rise_or_fall_from_one_look_to_the_next(lambda groups: Pass(Heads(1, 1, head_dim), groups))


def test_weights_are_rounded_for_their_products_alone():
    check_weights_are_rounded_for_their_products_alone(lambda groups: Pass(Heads(1, 1, 64), groups))


def test_nothing_to_do():
    case = Pass(QWEN, [])
    assert case.run().shape == (0, 32, 128)
    empty_group = Pass(QWEN, [ar(0, 100, 2), ar(1, 0, 0), diff(2, 0, 0)])
    assert_close(empty_group.run(), empty_group.expected())


def test_64_bit_offsets():
    """A cache beyond 2^31 elements and 4 GiB, with the sequence in its last pages."""
    case = Pass(QWEN, [ar(0, 200, 1), diff(0, 200, 16)], first_page=33000)
    assert case.k_pages.numel() > 2**31
    assert_close(case.run(), case.expected())
    assert torch.equal(case.run(), Pass(QWEN, case.groups).run())


@pytest.mark.parametrize("split", [True, False])
def test_graph_replay_reads_lengths_on_the_device(split):
    """One graph serves every length: captured with short contexts, replayed with long ones, it equals eager calls."""
    groups = [ar(0, 3000, 4), diff(0, 3000, 4), ar(1, 900, 4)]
    case = Pass(QWEN, groups, max_seq_len=4096)
    want = case.run()
    prefix = case.rows.prefix_len.clone()
    case.rows.prefix_len.fill_(1)
    out = torch.full_like(case.q, torch.nan)
    workspace = case.workspace() if split else None
    case.call(out, workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # back to back, like layers
            case.call(out, workspace)
    for lengths in (prefix, prefix.clamp(max=64), prefix):
        case.rows.prefix_len.copy_(lengths)
        out.fill_(torch.nan)
        graph.replay()
        eager = torch.full_like(out, torch.nan)
        case.call(eager, case.workspace())
        assert torch.equal(out, eager)
    assert torch.equal(out, want)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("slots, blocks, n", SHARED_BLOCKS)
def test_blocks_read_their_sequence_together(heads, slots, blocks, n):
    check_blocks_read_their_sequence_together(functools.partial(Pass, heads), slots, blocks, n)


def test_repeats_to_the_bit():
    case = Pass(QWEN, [ar(0, 9000, 32), diff(0, 9000, 32), diff(0, 9010, 32)])
    want = case.run()
    workspace = case.workspace()
    for _ in range(20):
        out = torch.full_like(case.q, torch.nan)
        case.call(out, workspace)
        assert torch.equal(out, want)


def test_head_dim_error():
    case = Pass(Heads(4, 2, 96), [ar(0, 10, 1)])
    with pytest.raises(ValueError, match=r"dual_attn: head_dim must be in \(64, 128\) on CUDA, got 96"):
        case.run()
