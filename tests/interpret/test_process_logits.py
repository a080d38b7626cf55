"""process_logits under the interpreter, against the oracle."""

import pytest
import torch

pytest.importorskip("triton")
from orthrus_rt.triton_kernels import count_tokens, filter_cut
from orthrus_rt.triton_kernels import process_logits as kernel
from tests import large_logits, sparse
from tests.logits_cases import (
    FILTERS,
    assert_agrees,
    block_with_edits,
    check_count_tokens,
    check_ids_outside,
    check_neighbouring_values,
    check_the_outermost_uniforms,
    check_the_unlikely,
    check_what_top_k_keeps,
    logits,
    with_filters,
)


def assert_same(case, purpose=2):
    return assert_agrees(case, kernel.process_logits, purpose)


# A partial tile, a full one, and three with a partial last one: each with relevant kinds, and in --full with all kinds.
QUICK = {1: ("hostile",), 300: ("normal", "peaked", "tied", "hostile"), 4096: ("peaked",), 9001: ("tied",)}
GRID = [
    pytest.param(vocab, kind, marks=() if kind in QUICK[vocab] else pytest.mark.full)
    for vocab in QUICK
    for kind in QUICK[300]
]


@pytest.mark.parametrize("vocab, kind", GRID)
def test_against_the_oracle(vocab, kind):
    choice = assert_same(with_filters(logits(len(FILTERS), vocab, kind)))
    assert choice.min() >= 0 and choice.max() < vocab


@pytest.mark.parametrize("kind", ["tied", pytest.param("normal", marks=pytest.mark.full)])
def test_penalties_bias_and_stop_ids(kind):
    assert_same(with_filters(logits(len(FILTERS), 5000, kind), edits=True))


@pytest.mark.parametrize("vocab", (12, 5000))
def test_blocks_with_edits(vocab):
    assert_same(block_with_edits(vocab))


def test_ids_outside_the_vocabulary():
    check_ids_outside(kernel.process_logits)


def test_neighbouring_values():
    check_neighbouring_values(kernel.process_logits)


def test_what_top_k_keeps():
    check_what_top_k_keeps(kernel.process_logits)


def test_the_outermost_uniforms():
    check_the_outermost_uniforms(kernel.process_logits)


def test_the_unlikely():
    check_the_unlikely(kernel.process_logits)


def test_rows_with_too_many_values_to_gather(monkeypatch):
    case = with_filters(logits(len(FILTERS), 5000, "peaked")).only(slice(2, 5))
    case.logits -= 20  # less than what is loaded for tokens outside the vocabulary
    gathered = case.run(kernel.process_logits)
    for most in (2, 70, 71):  # 71 values reach the rung of the row whose top-k is 20
        monkeypatch.setattr(filter_cut, "MOST_FOUND", most)
        assert all(torch.equal(*pair) for pair in zip(case.run(kernel.process_logits), gathered, strict=True))


def test_a_row_does_not_depend_on_company():
    case = with_filters(logits(len(FILTERS), 5000, "peaked"), edits=True)
    together = case.run(kernel.process_logits)
    for i in range(0, len(FILTERS), 3):
        alone = case.only(slice(i, i + 1)).run(kernel.process_logits)
        assert all(torch.equal(one[0], all_[i]) for one, all_ in zip(alone, together, strict=True))


def test_noise_depends_on_seed_position_and_purpose_alone():
    case = with_filters(logits(1, 300, "normal").expand(4, 300), [(3.0, 0, 1.0, 0.0)])
    case.sampling.seed.copy_(torch.tensor([2**40 + 1, 1, 2**40 + 1, 2**40 + 1]))
    case.rows.position[:4] = torch.tensor([5, 5, 5, 6], dtype=torch.int32)
    choice = assert_same(case, purpose=1).tolist()  # rows 0 ... 3 belong to slots 3 ... 0
    assert choice[0] == choice[1]
    assert len({*choice, int(case.choose(kernel.process_logits, purpose=0)[0])}) == 4


def test_nothing_to_do():
    case = with_filters(logits(1, 300, "normal")).only(slice(0))
    case.run(kernel.process_logits)


def test_count_tokens():
    check_count_tokens(count_tokens.count_tokens)


@pytest.mark.full
def test_count_tokens_64_bit_offsets():
    large_logits.check_count_tokens(count_tokens.count_tokens, sparse.empty)
