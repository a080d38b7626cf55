"""dual_attn's CUDA kernels as host C++: every index, wait and barrier, and row-invariance to the bit."""

import functools

import pytest
import torch

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

HostPass = functools.partial(Pass, device="cpu")


@pytest.fixture(params=("sm90", "sm80"), autouse=True)
def isa(request, monkeypatch):
    """The instruction variant."""
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def many_sms(host):
    """So many SMs that every unit is split."""
    host.num_sms = 1000


PASSES = {
    "decode": [ar(0, 300, 1), ar(1, 63, 1), ar(2, 64, 1), ar(3, 0, 1), ar(4, 127, 1)],
    "verify": [ar(0, 130, 6, invalid=2)],
    "draft": [diff(0, 0, 4), diff(1, 100, 4, invalid=1)],
    "one_pass": [ar(0, 200, 8), diff(0, 205, 8), diff(1, 30, 8, invalid=7)],
    "one_pass, 32 rows a block": [ar(0, 200, 32), diff(0, 205, 32)],
    "one_pass, three sequences": [ar(0, 100, 6), ar(1, 58, 6), *(diff(i, 64 * i, 6) for i in range(3))],
    "tall": [ar(1, 129, 50), diff(0, 10, 70)],
    "prompts": [ar(0, 0, 50), ar(1, 129, 3), ar(2, 300, 70), ar(3, 0, 1)],
    "padding": [ar(0, 10, 4, invalid=4), ar(1, 70, 2), diff(2, 10, 4, invalid=4)],
    "empty groups": [ar(0, 10, 2), ar(1, 0, 0), *(diff(s, 0, 0) for s in range(2, 9)), diff(9, 5, 2), diff(10, 0, 0)],
}
SMALL = Heads(3, 1, 64)


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("name", PASSES)
def test_against_float64(name, host):
    case = HostPass(SMALL, PASSES[name])
    fold, split, workspace = case.run(split=False), torch.empty_like(case.q), case.workspace()
    for host.num_sms in (1000, 20, 9, 6, 3, 2):  # down to so few that CTAs take several items
        case.call(split.fill_(torch.nan), workspace)
        assert torch.equal(split, fold)
    assert_close(split, case.expected())
    assert not split[case.rows.position < 0].any()


@pytest.mark.usefixtures("both_orders")  # with them, all variants that fold in registers run
@pytest.mark.parametrize("name", ["decode", "verify", "one_pass", "one_pass, 32 rows a block", "tall"])
@pytest.mark.parametrize("heads", [Heads(8, 2, 128), Heads(4, 4, 64), Heads(8, 1, 64)], ids=str)
def test_heads(heads, name, host):
    case = HostPass(heads, PASSES[name])
    split = case.run()
    assert_close(split, case.expected())
    host.num_sms = 1
    assert torch.equal(split, case.run(split=False))


@pytest.mark.parametrize("num_sms", [1000, 11])
@pytest.mark.parametrize(
    "groups",
    [
        [ar(i, 37 * i % 300, 1) for i in range(40)],
        [*(ar(i, 40 * i, 2) for i in range(8)), *(diff(i % 8, 40 * (i % 8), 2) for i in range(48))],
        [*(ar(i, i, 1) for i in range(90)), *(diff(i, i, 1) for i in range(38))],  # the most that may split
        [ar(i, i, 1) for i in range(129)],
    ],
    ids=["40 sequences", "8 with 6 blocks each", "90 with 38 blocks", "129 sequences"],
)
def test_many_units(groups, num_sms, host):
    host.num_sms = num_sms
    case = HostPass(SMALL, groups)
    split = case.run()
    assert_close(split, case.expected())
    assert torch.equal(split, case.run(split=False))


LONGEST = [(Heads(8, 2, 128), *shared) for shared in ((2, 3, 32), (5, 6, 2), (1, 2, 70), (3, 4, 5))]


@pytest.mark.parametrize(
    ("heads", "slots", "blocks", "n"),
    [
        pytest.param(*case, marks=pytest.mark.full if case in LONGEST else ())
        for case in ((heads, *shared) for heads in (SMALL, Heads(8, 2, 128)) for shared in SHARED_BLOCKS)
    ],
    ids=str,
)
def test_blocks_read_their_sequence_together(heads, slots, blocks, n, host):
    tall = n * heads.q // heads.kv
    pairs = slots * (1 + blocks) * -(-tall // 128) * heads.kv
    few = pairs * 4 // 3 + 1 if tall > 128 else pairs // 4 + 1
    for host.num_sms in (1000, few):  # so few that CTAs take several items, but still split
        check_blocks_read_their_sequence_together(functools.partial(HostPass, heads), slots, blocks, n)


@pytest.mark.parametrize("rows", [16, 17, 64, 65, 128, 129])
def test_tiles_that_are_full_and_one_row_more(rows, host):
    case = HostPass(Heads(1, 1, 64), [ar(0, 70, rows), diff(1, 70, rows)], max_seq_len=1000)
    for host.num_sms in (1000, 10):  # 10: fewer than items, so tall tiles are not halved
        split = case.run()
        assert_close(split, case.expected())
        assert torch.equal(split, case.run(split=False))


def test_rows_do_not_depend_on_company(host):
    """They have the same bits alone or together, in tiles of any height, in any order, on any number of SMs."""
    groups = [ar(0, 1100, 1), diff(0, 1101, 4), ar(1, 140, 9), ar(2, 5, 3)]
    together = HostPass(SMALL, groups)
    want = together.by_group(together.run())
    shuffled = HostPass(SMALL, [ar(7, 0, 30), *groups[::-1]], max_seq_len=5000)
    for host.num_sms in (1000, 30):  # 30: tall tiles
        got = shuffled.by_group(shuffled.run())
        assert all(torch.equal(got[g], want[g]) for g in groups)
    host.num_sms = 1000
    for g in groups:
        assert torch.equal(HostPass(SMALL, [g]).run(), want[g])
    host.num_sms = 5
    got = together.by_group(together.run())
    assert all(torch.equal(got[g], want[g]) for g in groups)


def test_a_workspace_that_is_too_small_is_left_alone():
    """The pass folds in registers, to the same bits. One that needs more than the largest workspace does so too."""
    case = HostPass(SMALL, PASSES["one_pass"])
    out, space = torch.full_like(case.q, torch.nan), case.workspace()
    case.call(out, space[:-1])
    assert torch.equal(out, case.run())
    assert not space.any()


def test_verify_rows_equal_decode_rows_and_chunks():
    start, n = 120, 45
    want = HostPass(SMALL, [ar(0, start, n)]).run()
    for i in (0, 7, 8, n - 1):
        assert torch.equal(HostPass(SMALL, [ar(0, start + i, 1)]).run()[0], want[i]), i
    for size in (7, 16):
        for at in range(0, n, size):
            part = HostPass(SMALL, [ar(0, start + at, min(size, n - at))])
            assert torch.equal(part.run(), want[at : at + size]), (size, at)


def test_a_nan_key_spoils_those_who_see_it_alone():
    check_a_nan_key_spoils_those_who_see_it_alone(lambda groups: HostPass(SMALL, groups))


@pytest.mark.parametrize("spoil", SPOIL)
def test_nan_outlives_the_splits(spoil):
    check_nan_outlives_the_splits(lambda groups: HostPass(SMALL, groups), spoil)


def test_scores_of_minus_infinity_have_no_weight():
    check_scores_of_minus_infinity_have_no_weight(lambda groups: HostPass(SMALL, groups))


def test_long_context_reaches_every_length_of_split():
    """Also Qwen3's longest context, 40,960 tokens, whose partial results one warp folds in three rounds."""
    for groups in ([ar(0, 17500, 1), diff(0, 17400, 2)], [ar(0, 40959, 1)]):
        case = HostPass(Heads(1, 1, 64), groups)
        split = case.run()
        assert_close(split, case.expected())
        assert torch.equal(split, case.run(split=False))


def test_maxima_that_rise_or_fall_from_one_look_to_the_next():
    check_maxima_that_rise_or_fall_from_one_look_to_the_next(lambda groups: HostPass(Heads(1, 1, 64), groups))


def test_weights_are_rounded_for_their_products_alone():
    check_weights_are_rounded_for_their_products_alone(lambda groups: HostPass(Heads(1, 1, 64), groups))


def test_no_workspace_takes_more_than_512_mib(host):
    least = [host.dual_attn_workspace(rows, 32, 128, 40960) for rows in (467, 468)]
    assert least[0] < least[1] == host.dual_attn_workspace(1 << 20, 32, 128, 40960) == 512 << 20


def test_64_bit_offsets():
    """Pages beyond 2^31 elements; untouched ones take no memory."""
    groups = [ar(0, 70, 2), diff(0, 70, 2)]
    far = HostPass(Heads(1, 1, 64), groups, first_page=(1 << 31) // (64 * 64) + 1)
    assert far.k_pages.numel() > 2**31
    assert torch.equal(far.run(), HostPass(Heads(1, 1, 64), groups).run())
