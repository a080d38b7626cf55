"""dual_attn on the CPU over several splits: folded by one thread or computed apart, they give the same bits."""

import pytest
import torch

from tests.attention_pass import SPOIL, Heads, Pass, check_nan_outlives_the_splits, set_values
from tests.native_cpu import threads
from tests.rows import Group, ar, diff

SPLIT = 512
HEADS = Heads(6, 2, 64)
STARTS = [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 1500, 8 * SPLIT + 4]
COMPANY = [ar(1, 2 * SPLIT + 100, 2), diff(2, 40, 4), ar(3, 0, 12)]


def make(groups, dtype):
    return Pass(HEADS, groups, device="cpu", dtype=dtype)


def run(case, num_threads):
    with threads(num_threads):
        return case.run()


def assert_near(case, got):
    """Each weight and the output are rounded; the slack is for sums in fp32."""
    want = case.expected()
    error = (got.double() - want).norm() / want.norm()
    assert error < torch.finfo(case.dtype).eps / 3 + 2e-6, float(error)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("view", "n"), [("ar", 1), ("ar", 16), ("diff", 16)])
def test_threads_and_company_change_no_bit(isa, element, view, n, start):
    group = Group(view, 0, start, n, invalid=n // 8)
    alone = make([group], element)
    want = run(alone, 1)
    assert_near(alone, want)
    beside = make([group, *COMPANY], element)
    for count in (1, 2, 5, 16):
        assert torch.equal(run(alone, count), want)
        assert torch.equal(beside.by_group(run(beside, count))[group], want)


@pytest.mark.parametrize("start", [0, SPLIT - 8, 1500])
def test_chunks_of_a_long_prompt_change_no_bit(isa, element, start):
    """600 causal rows at once, 100 of them, 16, and the last one alone."""
    case = make([ar(0, start, 600)], element)
    whole = run(case, 1)
    assert_near(case, whole)
    assert torch.equal(run(case, 5), whole)
    for first, count in [(599, 1), (584, 16), (500, 100), (0, 16)]:
        chunk = make([ar(0, start + first, count)], element)
        for num_threads in (1, 5):
            assert torch.equal(run(chunk, num_threads), whole[first : first + count])


def test_who_is_done_first_changes_no_bit(isa, element):
    case = make([ar(0, 8 * SPLIT, 1)], element)
    want = run(case, 1)
    with threads(5):
        assert all(torch.equal(case.run(), want) for _ in range(20))


def test_longer_prefixes_within_a_block_change_no_bit(isa, element):
    """A row sees its block after its own last split, whatever the other rows of the block see before it."""
    case = make([diff(0, 2 * SPLIT + 5, 4)], element)
    longest = int(case.rows.prefix_len[0])
    case.rows.prefix_len[:] = SPLIT - 1
    want = run(case, 1)[0]
    case.rows.prefix_len[1:] = longest
    for num_threads in (1, 5):
        got = run(case, num_threads)
        assert_near(case, got)
        assert torch.equal(got[0], want)


def test_the_last_row_sees_most(isa, element):
    alone = make([ar(0, 3 * SPLIT, 1)], element)
    case = make([ar(1, SPLIT + 1, 1), ar(0, 3 * SPLIT, 1)], element)
    for num_threads in (1, 5):
        assert torch.equal(run(case, num_threads)[1:], run(alone, 1))


class EitherWay(Pass):
    """Splits as separate items, or one after another on one thread."""

    def run(self, split=True):
        with threads(16 if split else 1):
            return super().run()


@pytest.mark.parametrize("spoil", SPOIL)
def test_nan_outlives_the_splits(isa, element, spoil):
    check_nan_outlives_the_splits(
        lambda groups: EitherWay(HEADS, groups, device="cpu", dtype=element), spoil, split=SPLIT
    )


@pytest.mark.parametrize("position", [3, SPLIT + 3, 2 * SPLIT + 3])
def test_an_infinite_value_reaches_those_who_see_it(isa, element, position):
    groups = [ar(0, position - 4, 8), diff(0, 3 * SPLIT, 2)]
    case = make(groups, element)
    clean = run(case, 1)
    set_values(case, [position], torch.inf)
    dirty = run(case, 1)
    assert torch.equal(dirty[:4], clean[:4]) and not dirty[4:].isfinite().any()
    assert torch.equal(run(case, 16).nan_to_num(7.0), dirty.nan_to_num(7.0))


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_nan_that_another_pass_left_on_the_stack_reaches_nobody(isa, element, dim):
    """Where the keys fill no tile, what stands in for the missing ones weighs nothing, but 0 times NaN is NaN."""
    case = Pass(Heads(32, 1, dim), [ar(0, 4, 1), ar(1, 36, 1), ar(2, SPLIT + 4, 1)], device="cpu", dtype=element)
    want, bound = case.expected(), case.bound()
    for dtype in (torch.bfloat16, torch.float32):
        wild = Pass(Heads(32, 1, 256), [ar(0, SPLIT + 87, 1)], device="cpu", dtype=dtype)
        for spoiled in ((wild.q,), (wild.k_pages, wild.v_pages)):
            for x in spoiled:
                x.fill_(torch.nan)
            for count in (1, 2, 2, 2):
                run(wild, 1)
                assert ((run(case, count).double() - want).abs() <= bound).all()
