"""process_logits under the interpreter, against the oracle."""

import pytest
import torch

pytest.importorskip("triton")
from orthrus_rt import reference
from orthrus_rt.triton_kernels import process_logits as kernel
from tests.logits_cases import FILTERS, block_with_edits, choices, logits, with_filters


def assert_same(case, **kwargs):
    """Same sets, choices and, to the last bits of exp and log, scores; those out of reach may be left out."""
    value, index, log_probs = case.run(kernel.process_logits, **kwargs)
    want_value, want_index, want_log = case.run(reference.process_logits, **kwargs)
    got, want = choices(value, index), choices(want_value, want_index)
    assert got.tolist() == want.tolist()
    both = value.isfinite() & want_value.isfinite()
    torch.testing.assert_close(value[both], want_value[both], rtol=1e-5, atol=1e-5)
    assert torch.equal(index[both], want_index[both])
    best = want_value.amax(1, keepdim=True).expand_as(value)
    assert (torch.maximum(value, want_value) < best)[value.isfinite() != want_value.isfinite()].all()
    first = 128 * torch.arange(value.shape[1], dtype=torch.int32).expand_as(index)
    assert torch.equal(index[value.isneginf()], first[value.isneginf()])
    valid = case.rows.position[case.logit_rows.long()] >= 0
    assert torch.equal(log_probs[valid].isneginf(), want_log[valid].isneginf())
    torch.testing.assert_close(log_probs[valid], want_log[valid], rtol=1e-5, atol=3e-6)
    return got


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied", "hostile"])
@pytest.mark.parametrize("vocab", [1, 300, 4096, 9001])
def test_against_the_oracle(vocab, kind):
    choice = assert_same(with_filters(logits(len(FILTERS), vocab, kind)))
    assert choice.min() >= 0 and choice.max() < vocab


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_penalties_bias_and_stop_ids(kind):
    assert_same(with_filters(logits(len(FILTERS), 5000, kind), edits=True))


def test_blocks_with_edits():
    assert_same(block_with_edits(5000))


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
    choice = assert_same(case, purpose=1).tolist()  # rows 0 ... 3 are of slots 3 ... 0
    assert choice[0] == choice[1]
    assert len({*choice, int(case.choose(kernel.process_logits, purpose=0)[0])}) == 4


def test_nothing_to_do():
    case = with_filters(logits(1, 300, "normal")).only(slice(0))
    case.run(kernel.process_logits)
