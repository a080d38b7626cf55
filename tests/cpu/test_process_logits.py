"""The process_logits oracle against definitions in float64, and its noise against its distribution."""

import math

import pytest
import torch

from orthrus_rt import reference
from tests.logits_cases import FILTERS, extras, logits, with_filters


def naive_probs(row, temperature, top_k, top_p, min_p):
    """One row, float64, a sorted list and a loop."""
    clean = [-math.inf if math.isnan(x) else x for x in row]
    if temperature == 0:
        best = max(range(len(clean)), key=lambda i: (clean[i], -i))
        return [float(i == best) for i in range(len(clean))]
    order = sorted(range(len(clean)), key=lambda i: -clean[i])
    if 0 < top_k < len(order):
        order = [i for i in order if clean[i] >= clean[order[top_k - 1]]]
    weight = {i: math.exp((clean[i] - clean[order[0]]) / temperature) for i in order}
    if top_p < 1:
        total, mass = sum(weight.values()), 0.0
        for last in order:
            mass += weight[last]
            if mass >= top_p * total:
                break
        order = [i for i in order if clean[i] >= clean[last]]
    order = [i for i in order if weight[i] >= min_p]
    total = sum(weight[i] for i in order)
    kept = {i: weight[i] / total for i in order}
    return [kept.get(i, 0.0) for i in range(len(clean))]


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied"])
@pytest.mark.parametrize("vocab", [1, 7, 300, 3000])
def test_probs_are_the_definition(vocab, kind):
    args = with_filters(logits(len(FILTERS), vocab, kind))
    got = reference.process_logits_probs(*args[:5])
    for row, filters, probs in zip(args[0].tolist(), FILTERS, got, strict=True):
        want = torch.tensor(naive_probs(row, *filters), dtype=torch.float64)
        assert torch.equal(probs > 0, want.float() > 0), filters
        torch.testing.assert_close(probs.double(), want, rtol=1e-4, atol=1e-7)


def test_numbers_stand_for_columns():
    rows = logits(3, 500, "normal")
    got = reference.process_logits_probs(rows, 0.7, 40, 0.9, 0.01)
    columns = torch.tensor([0.7]), torch.tensor([40]), torch.tensor([0.9]), torch.tensor([0.01])
    assert torch.equal(got, reference.process_logits_probs(rows, *columns))
    assert torch.equal(got, reference.process_logits_probs(rows, *(c.expand(3) for c in columns)))


def test_a_row_does_not_depend_on_company():
    args = with_filters(logits(len(FILTERS), 5000, "peaked"))
    together = reference.process_logits_probs(*args[:5])
    for i in range(len(FILTERS)):
        assert torch.equal(reference.process_logits_probs(*(a[i : i + 1] for a in args[:5]))[0], together[i])


def test_hostile_rows_choose_a_token():
    args = with_filters(logits(len(FILTERS), 300, "hostile"))
    choice = torch.full((len(FILTERS),), -1, dtype=torch.int32)
    reference.process_logits(*args, 0, choice)
    assert choice.min() >= 0 and choice.max() < 300
    nothing = torch.full((2, 9), torch.nan)
    reference.process_logits(*with_filters(nothing, [(1.0, 5, 0.5, 0.1)]), 0, choice[:2])
    assert choice[:2].tolist() == [0, 0]
    assert not reference.process_logits_probs(args[0], *args[1:5]).isnan().any()


def test_penalties_bias_and_stop_ids_are_their_definition():
    n, vocab = 6, 200
    args = with_filters(logits(n, vocab, "normal"), [(1.0, 0, 1.0, 0.0)])
    more = extras(n, vocab, args[6])
    got = torch.empty(n, vocab)
    choice = torch.empty(n, dtype=torch.int32)
    reference.process_logits(*args, 0, choice, log_probs=got, **more)
    for r in range(n):
        row = args[0][r].tolist()
        repetition, presence, frequency = more["penalties"][r].tolist()
        for t, count in enumerate(more["token_counts"][r].tolist()):
            if count:
                row[t] = row[t] / repetition if row[t] > 0 else row[t] * repetition
            if count > 0:
                row[t] -= presence + frequency * count
        for t, value in zip(more["bias_ids"][r].tolist(), more["bias_values"][r].tolist(), strict=True):
            if t >= 0:
                row[t] += value
        if args[6][r] < more["min_position"][r]:
            for t in more["stop_ids"][r].tolist():
                if t >= 0:
                    row[t] = -math.inf
        want = torch.tensor(row, dtype=torch.float64).log_softmax(0)
        torch.testing.assert_close(got[r].double(), want, rtol=1e-5, atol=1e-5)


def test_philox_known_answers():
    """The vector published with the generator (Salmon et al. 2011) for a counter and a key of zeros."""
    zero = [int(reference.philox(0, 0, 0, t)) for t in range(4)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seeds = [0, 1, 2**32, 2**62 + 5]
    words = {int(reference.philox(s, p, q, t)) for s in seeds for p in (0, 1) for q in (0, 1) for t in range(8)}
    assert len(words) == 4 * 2 * 2 * 8


def test_uniform_is_uniform_and_inside():
    u = reference.uniform(7, 3, 1, torch.arange(1 << 16))
    assert u.dtype is torch.float32 and u.min() > 0 and u.max() < 1
    histogram = torch.histc(u, 64, 0, 1)
    assert ((histogram - 1024) ** 2 / 1024).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert torch.equal(u[123], reference.uniform(7, 3, 1, 123))


def test_choices_follow_the_distribution():
    """Chi-square of 20,000 draws at as many positions."""
    n, vocab = 20000, 50
    row = logits(1, vocab, "normal")
    args = list(with_filters(row.expand(n, vocab), [(1.2, 30, 0.95, 0.01)]))
    args[5] = torch.full((n,), 99)
    choice = torch.empty(n, dtype=torch.int32)
    reference.process_logits(*args, 1, choice)
    expected = reference.process_logits_probs(row, 1.2, 30, 0.95, 0.01)[0] * n
    counts = torch.bincount(choice, minlength=vocab)
    kept = expected > 0
    assert not counts[~kept].any()
    degrees = int(kept.sum()) - 1
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < degrees + 5 * math.sqrt(2 * degrees)
