"""Native process_logits on the CPU: against the oracle, and to the bit whatever the other rows and the threads."""

import math

import pytest
import torch

from orthrus_rt import native
from tests.logits_cases import (
    FILTERS,
    assert_agrees,
    block_with_edits,
    check_draws,
    check_ids_outside,
    check_neighbouring_values,
    check_the_outermost_uniforms,
    check_the_unlikely,
    check_what_top_k_keeps,
    logits,
    with_filters,
)
from tests.native_cpu import threads
from tests.rows import ar, make_rows

KINDS = ["normal", "peaked", "tied", "hostile"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 17, 300, 4096, 9001])
def test_against_the_oracle(isa, vocab, kind):
    assert_agrees(with_filters(logits(2 * len(FILTERS), vocab, kind)), native.process_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_bias_and_stop_ids(isa, kind):
    assert_agrees(with_filters(logits(len(FILTERS), 3001, kind), edits=True), native.process_logits)


@pytest.mark.parametrize("vocab", [4, 1000])
def test_blocks_with_edits(isa, vocab):
    """Drafts count only in AR rows; invalid rows yield zeros."""
    assert_agrees(block_with_edits(vocab), native.process_logits)


@pytest.mark.parametrize("before", (0, 1))
def test_a_draft_in_the_first_row_of_a_pass(isa, before):
    """It counts, whatever stands before it in the pass."""
    groups = [ar(1, 3, 1)] * before + [ar(0, 11, 1)]
    case, rows = with_filters(logits(2, 130, "normal"), [FILTERS[0]], edits=True), make_rows(groups)
    rows.token.fill_(5)
    case.rows, case.logit_rows = rows, torch.tensor([rows.num_rows - 1], dtype=torch.int32)
    case.cache_seqlens, case.logits = torch.tensor([10, 3], dtype=torch.int32), torch.zeros(1, 130)
    case.logits[0, [5, 7]] = torch.tensor([2.0, 1.5])
    edits = case.sampling.edits
    edits.penalties.copy_(torch.tensor([1.0, 1.0, 0.0]))
    edits.token_counts.zero_(), edits.bias_ids.fill_(-1), edits.min_position.zero_()
    assert assert_agrees(case, native.process_logits).tolist() == [7]


def test_ids_outside_the_vocabulary(isa):
    check_ids_outside(native.process_logits)


def test_neighbouring_values(isa):
    check_neighbouring_values(native.process_logits)


def test_more_drafts_than_tokens(isa):
    assert_agrees(block_with_edits(4, 250), native.process_logits)


def test_mass_of_one_unit(isa):
    """70,000 tokens of 1.1 ... 1.2 units each have mass enough to reach top-p's share; without it one token would."""
    row = torch.full((1, 70001), -3.0)
    row[0, 1:] += math.log(1.2) - 40 * math.log(2) - 1e-6 * torch.arange(70000)
    log_probs = with_filters(row, [(1.0, 0, 1 - 2.0**-24, 0.0)]).run(native.process_logits)[2]
    assert 4000 < int(log_probs.isfinite().sum()) < 5000


def test_what_top_k_keeps(isa):
    check_what_top_k_keeps(native.process_logits)


def test_the_outermost_uniforms(isa):
    check_the_outermost_uniforms(native.process_logits)


def test_the_unlikely(isa):
    check_the_unlikely(native.process_logits)


@pytest.mark.parametrize("kind", ["peaked", "tied"])
def test_filters_at_every_size_of_set(isa, kind):
    """From one token to all of them: every rung, and more than the last one."""
    filters = [(1.0, k, p, 0.0) for k in (0, 1, 2, 15, 16, 17, 100, 1500, 2999) for p in (1.0, 0.9999, 0.6)]
    filters += [(t, 0, p, m) for t in (0.05, 30.0) for p in (0.999999, 0.5) for m in (0.0, 1e-6, 0.3)]
    assert_agrees(with_filters(logits(len(filters), 3000, kind), filters), native.process_logits)


def test_a_row_does_not_depend_on_company_or_threads(isa):
    case = with_filters(logits(2 * len(FILTERS), 5000, "peaked"), edits=True)
    with threads(1):
        want = case.run(native.process_logits)
    order = torch.randperm(len(case), generator=torch.Generator().manual_seed(0))
    with threads(3):
        for some in (slice(None), slice(3, 4), slice(0, 7), order):
            part = case.only(some).run(native.process_logits)
            assert all(torch.equal(one, all_[some]) for one, all_ in zip(part, want, strict=True))


def test_the_draw_does_not_depend_on_log_probs(isa):
    case = with_filters(logits(len(FILTERS), 700, "normal"))
    value, index, _ = case.run(native.process_logits)
    again = torch.empty_like(value), torch.empty_like(index)
    args = case.logits.clone(), case.rows, case.logit_rows, case.sampling, case.cache_seqlens
    native.process_logits(*args, 2, again)
    assert torch.equal(again[0], value) and torch.equal(again[1], index)


def test_choices_follow_the_distribution(isa):
    check_draws(native.process_logits)
