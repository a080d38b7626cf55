"""dual_attn on the CPU: the mask of rows.h and nothing else, with the same bits whatever rows share the pass."""

import pytest
import torch

from orthrus_rt import reference
from tests.attention_pass import SPOIL, Heads, Pass, check_nan_outlives_the_splits, set_keys, set_values
from tests.native_cpu import threads
from tests.rows import ar, diff

GROUPS = [
    ar(0, 60, 9), ar(1, 0, 1), ar(2, 128, 64), ar(3, 0, 1, invalid=1), ar(1, 191, 1), ar(0, 63, 1),
    diff(0, 69, 16), diff(1, 0, 5, invalid=2), diff(2, 127, 65), diff(3, 0, 4, invalid=4), diff(1, 64, 1),
]  # fmt: skip
HEADS = [
    Heads(9, 3, 64), Heads(4, 2, 128), Heads(8, 1, 48), Heads(3, 3, 16), Heads(30, 1, 32), Heads(6, 2, 80),
    Heads(2, 1, 96), Heads(3, 1, 256),
]  # fmt: skip


def make(groups, dtype, heads=HEADS[0]):
    return Pass(heads, groups, device="cpu", dtype=dtype)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_mask_and_nothing_else(isa, element, heads):
    case = make(GROUPS, element, heads)
    got = case.run()
    assert ((got.double() - case.expected()).abs() <= case.bound()).all()
    assert not got[case.rows.position < 0].any()


@pytest.mark.parametrize("n", (15, 16, 17, 31, 32, 33))
def test_about_as_many_queries_and_keys_as_a_tile_has(isa, element, n):
    """Of a block's keys the first ones are then used in place, and the last ones are copied."""
    case = make([ar(0, 50, n), diff(0, 50, n)], element, Heads(2, 2, 32))
    assert ((case.run().double() - case.expected()).abs() <= case.bound()).all()


@pytest.mark.parametrize("invalid", (1, 5, 15, 16, 31))
def test_an_invalid_row_within_a_block(isa, element, invalid):
    """The keys of the other rows are not evenly spaced."""
    case = make([diff(0, 70, 36)], element)
    case.rows.position[invalid], case.rows.prefix_len[invalid] = -1, 0
    for rows in (case.q, case.scratch_k, case.scratch_v):
        rows[invalid] = torch.nan
    got = case.run()
    assert ((got.double() - case.expected()).abs() <= case.bound()).all()
    assert not got[invalid].any()


@pytest.mark.parametrize("heads", HEADS[:3], ids=str)
def test_row_invariance(isa, element, heads):
    """The same bits alone, batched, in another order of groups, and on 1, 2 or 3 threads."""
    case = make(GROUPS, element, heads)
    whole = case.run()
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(case.run(), whole)
    backwards = make(GROUPS[::-1], element, heads)
    got = backwards.by_group(backwards.run())
    for group, want in case.by_group(whole).items():
        assert torch.equal(got[group], want)
        assert torch.equal(make([group], element, heads).run(), want)


def test_chunks_of_a_prompt_change_no_bit(isa, element):
    """128 causal rows in one chunk, in chunks of 16 and 50, and one by one."""
    whole = make([ar(0, 0, 128)], element).run()
    for size in (1, 16, 50):
        for first in range(0, 128, size):
            got = make([ar(0, first, min(size, 128 - first))], element).run()
            assert torch.equal(got, whole[first : first + size])


@pytest.mark.parametrize(
    "wild", [(torch.nan, torch.nan), (0.0, torch.nan), (0.0, torch.inf), (0.0, -torch.inf)], ids=str
)
def test_nan_of_one_row_stays_with_those_who_see_it(isa, element, wild):
    """A wild key or value at position 70 reaches rows 70 and later, not the earlier rows of the same tile."""

    def run(group):
        case = make([group], element)
        set_keys(case, [70], wild[0])
        set_values(case, [70], wild[1])
        return case.run()

    clean, dirty = make([ar(0, 0, 80)], element).run(), run(ar(0, 0, 80))
    assert torch.equal(dirty[:70], clean[:70])
    assert not dirty[70:].isfinite().any()
    odd = run(ar(0, 64, 7))  # the last key
    assert torch.equal(odd[:6], clean[64:70]) and not odd[6].isfinite().any()
    for first in (64, 71):  # some of them alone: their sums are made of other tiles
        assert torch.equal(run(ar(0, first, 9)).nan_to_num(7.0), dirty[first : first + 9].nan_to_num(7.0))


def test_an_infinite_value_that_weighs_nothing_is_nan(isa, element):
    case = make([ar(0, 80, 1), diff(0, 80, 4)], element)
    case.q[:] = 8
    set_keys(case, [70], -8)
    set_values(case, [70], torch.inf)
    assert case.run().isnan().all()


@pytest.mark.parametrize("spoil", SPOIL)
def test_nan_outlives_what_else_a_row_sees(isa, element, spoil):
    check_nan_outlives_the_splits(lambda groups: make(groups, element), spoil)


@pytest.mark.parametrize("blind", (range(1), range(64), range(70), range(512), range(600), range(3, 70)), ids=str)
def test_scores_of_minus_infinity(isa, element, blind):
    """Keys that overflowed, whose product with a query is -inf: they weigh nothing, wherever they stand, and a row that
    sees nothing else yields zeros. The other rows yield what they yield without these keys.
    """
    lengths = (1, 64, 65, 70, 513, 600)
    case = make([ar(i, length - 1, 1) for i, length in enumerate(lengths)], element, Heads(2, 1, 32))
    case.q[..., 0] = -1
    for seq, length in enumerate(lengths):
        for position in blind:
            if position < length:
                case.k_pages[case.page_table[seq, position // 64], :, position % 64, 0] = torch.inf
    got = case.run()
    want = torch.empty_like(got)
    reference.dual_attn(
        case.q, case.k_pages, case.v_pages, case.page_table, None, None, case.rows, case.softmax_scale, want
    )
    assert got.isfinite().all() and (got - want).abs().max() <= (2e-5 if element is torch.float32 else 2e-2)
    sees_nothing = torch.tensor([set(range(length)) <= set(blind) for length in lengths])
    assert torch.equal(got.flatten(1).any(1), ~sees_nothing)


def test_no_zero_is_negative(isa, element):
    """This includes what is left of a negative value that weighs nothing: tiles of AMX would lose the sign."""
    case = make([ar(0, 70, 1)], element, Heads(1, 1, 16))
    first, second = case.page_table[0, :2]
    case.q.zero_()[..., 0] = 1
    case.k_pages.zero_()[second, ..., 0] = 8000
    case.v_pages[first], case.v_pages[second] = -1, -0.0
    got = case.run()
    assert not got.any() and not got.signbit().any()


def test_large_scores(isa, element):
    """Scores in the thousands: the softmax picks the largest and overflows nowhere."""
    case = make([ar(0, 100, 1)], element, Heads(1, 1, 64))
    case.q *= 1000
    assert ((case.run().double() - case.expected()).abs() <= case.bound() + 1e-3).all()


def test_scores_far_below_zero(isa, element):
    """The weights are those of their differences, none of which underflows."""
    case = make([ar(0, 100, 1), ar(1, 600, 1)], element, Heads(1, 1, 64))
    case.q[..., 0], case.k_pages[..., 0] = 64, -64
    assert ((case.run().double() - case.expected()).abs() <= case.bound() + 1e-3).all()


@pytest.mark.parametrize("position", (0, 1, 2, 3, 13, 44, 62))
def test_the_largest_score_may_be_anyones(isa, element, position):
    """Another score, 32 keys later, is too large for e^score as well."""
    case = make([ar(0, 99, 1)], element, Heads(1, 1, 64))
    case.q[:] = 8
    set_keys(case, [position], 8)
    set_keys(case, [position + 32], 7.875)
    assert ((case.run().double() - case.expected()).abs() <= case.bound() + 1e-3).all()


@pytest.mark.parametrize("first", (0, 1))
@pytest.mark.parametrize("heads", (1, 8))
def test_weights_are_rounded_before_they_weigh_and_are_summed(isa, heads, first):
    """Two keys, the second with e^-1.453125 = 0.23384 of the first's weight, which bf16 rounds to 0.2333984375."""
    case = make([ar(0, 1, 1)], torch.bfloat16, Heads(heads, 1, 16))
    case.q.zero_()[..., 0] = 1
    keys, values = (pages[case.page_table[0, 0], 0, :2] for pages in (case.k_pages, case.v_pages))
    keys.zero_()[1 - first, 0] = -5.8125
    values.zero_()
    values[first, 0], values[1 - first, 0], values[first, 1] = -0.2333984375, 1, 1
    got = case.run()[0]
    assert not got[:, 0].any(), "its product with a value"
    assert bool((got[:, 1] == 0.8125).all()), "the sum: 1 / 1.23384 is nearer to 0.80859375"


def test_64_bit_offsets(isa):
    """Pages beyond 2^31 elements; untouched ones take no memory."""
    groups, heads = [ar(0, 70, 2), diff(0, 70, 2)], Heads(1, 1, 64)
    far = Pass(heads, groups, "cpu", first_page=(1 << 31) // (64 * 64) + 1)
    assert far.k_pages.numel() > 2**31
    assert torch.equal(far.run(), Pass(heads, groups, "cpu").run())


def test_no_rows_and_wrong_head_dim():
    assert make([], torch.bfloat16).run().shape == (0, 9, 64)
    with pytest.raises(
        ValueError,
        match="head_dim must be a multiple of 16 up to 256 on the CPU, got 24; ORTHRUS_BACKEND=dual_attn=ref",
    ):
        make([ar(0, 0, 1)], torch.bfloat16, Heads(1, 1, 24)).run()
