"""process_logits under the interpreter, against the oracle."""

import pytest
import torch

pytest.importorskip("triton")
from orthrus_rt import reference
from orthrus_rt.triton_kernels import process_logits as kernel
from tests.logits_cases import FILTERS, extras, logits, with_filters


def run(implementation, args, purpose=2, **kwargs):
    n, vocab = args[0].shape
    choice = torch.full((n,), -7, dtype=torch.int32)
    log_probs = torch.full((n, vocab), 7.0)
    implementation(args[0].clone(), *args[1:], purpose, choice, log_probs=log_probs, **kwargs)
    return choice, log_probs


def assert_same(args, **kwargs):
    (got, got_log), (want, want_log) = (
        run(kernel.process_logits, args, **kwargs),
        run(reference.process_logits, args, **kwargs),
    )
    assert got.tolist() == want.tolist()
    assert torch.equal(got_log.isneginf(), want_log.isneginf())
    torch.testing.assert_close(got_log, want_log, rtol=1e-5, atol=3e-6)
    return got


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied", "hostile"])
@pytest.mark.parametrize("vocab", [1, 300, 4096, 9001])
def test_against_the_oracle(vocab, kind):
    choice = assert_same(with_filters(logits(len(FILTERS), vocab, kind)))
    assert choice.min() >= 0 and choice.max() < vocab


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_penalties_bias_and_stop_ids(kind):
    args = with_filters(logits(len(FILTERS), 5000, kind))
    assert_same(args, **extras(len(FILTERS), 5000, args[6]))


def test_a_row_does_not_depend_on_company():
    args = with_filters(logits(len(FILTERS), 5000, "peaked"))
    choice, log_probs = run(kernel.process_logits, args)
    for i in range(0, len(FILTERS), 3):
        one_choice, one_log = run(kernel.process_logits, tuple(a[i : i + 1] for a in args))
        assert one_choice[0] == choice[i] and torch.equal(one_log[0], log_probs[i])


def test_noise_depends_on_seed_position_and_purpose_alone():
    row = logits(1, 300, "normal").expand(4, 300)
    args = list(with_filters(row, [(3.0, 0, 1.0, 0.0)]))
    args[5] = torch.tensor([2**40 + 1, 2**40 + 1, 1, 2**40 + 1])
    args[6] = torch.tensor([5, 5, 5, 6], dtype=torch.int32)
    choice = assert_same(tuple(args), purpose=1)
    assert choice[0] == choice[1]
    assert len(set(choice.tolist()) | {int(run(kernel.process_logits, tuple(args), purpose=0)[0][0])}) == 4


def test_nothing_to_do():
    args = with_filters(logits(1, 300, "normal"))
    kernel.process_logits(*(a[:0] for a in args), 0, torch.empty(0, dtype=torch.int32))
