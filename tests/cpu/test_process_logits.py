"""The process_logits oracle against definitions in float64, and its noise against its distribution."""

import math

import pytest
import torch

from orthrus_rt import reference
from orthrus_rt.filters import filtered_probabilities
from tests.logits_cases import (
    FILTERS,
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


def probs_of(case):
    """filtered_probabilities of every row of a case."""
    filters = (t[case.rows.seq[case.logit_rows].long()] for t in case.sampling.filters())
    return filtered_probabilities(case.logits, *filters)


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied"])
@pytest.mark.parametrize("vocab", [1, 7, 300, 3000])
def test_probs_are_the_definition(vocab, kind):
    case = with_filters(logits(len(FILTERS), vocab, kind))
    for row, filters, probs in zip(case.logits.tolist(), FILTERS, probs_of(case), strict=True):
        want = torch.tensor(naive_probs(row, *filters), dtype=torch.float64)
        assert torch.equal(probs > 0, want.float() > 0), filters
        torch.testing.assert_close(probs.double(), want, rtol=1e-4, atol=1e-7)


def test_numbers_stand_for_columns():
    rows = logits(3, 500, "normal")
    got = filtered_probabilities(rows, 0.7, 40, 0.9, 0.01)
    columns = torch.tensor([0.7]), torch.tensor([40]), torch.tensor([0.9]), torch.tensor([0.01])
    assert torch.equal(got, filtered_probabilities(rows, *columns))
    assert torch.equal(got, filtered_probabilities(rows, *(c.expand(3) for c in columns)))


def test_a_row_does_not_depend_on_company():
    case = with_filters(logits(len(FILTERS), 5000, "peaked"))
    together = probs_of(case)
    for i in range(len(FILTERS)):
        assert torch.equal(probs_of(case.only(slice(i, i + 1)))[0], together[i])


def test_hostile_rows_choose_a_token():
    case = with_filters(logits(len(FILTERS), 300, "hostile"))
    choice = case.choose(reference.process_logits)
    assert choice.min() >= 0 and choice.max() < 300
    nothing = with_filters(torch.full((2, 9), torch.nan), [(1.0, 5, 0.5, 0.1), (0.0, 0, 1.0, 0.0)])
    assert nothing.choose(reference.process_logits).tolist() == [0, 0]
    assert not probs_of(case).isnan().any()


def test_scores_are_partial_maxima():
    """Per 128 tokens, the best y + Gumbel noise among the kept tokens; for a greedy row, the best of all its logits."""
    rows = logits(4, 700, "normal")
    case = with_filters(rows, [(0.0, 3, 0.5, 0.5), (0.8, 0, 0.9, 0.0)])
    value, index, log_probs = case.run(reference.process_logits)
    for i, row in enumerate(rows):
        r, slot = int(case.logit_rows[i]), int(case.rows.seq[case.logit_rows[i]])
        temperature, position = float(case.sampling.temperature[slot]), int(case.rows.position[r]) + 1
        noise = reference.exponential(case.sampling.seed[slot], position, 2, torch.arange(700))
        score = row if temperature == 0 else row / temperature - torch.log(noise)
        if temperature:
            score = torch.where(log_probs[i].isneginf(), -torch.inf, score)
        for tile, part in enumerate(score.split(128)):
            left_out = temperature > 0 and not bool(value[i, tile].isfinite())
            assert left_out or float(value[i, tile]) == float(part.max())
            assert int(index[i, tile]) == 128 * tile + (0 if left_out else int(part.argmax()))
            assert not left_out or float(part.max()) < float(value[i].max())


def edited(row, case, i):
    """One row of logits after penalties, bias and stop mask: a loop over lists."""
    edits, r = case.sampling.edits, int(case.logit_rows[i])
    slot, position = int(case.rows.seq[r]), int(case.rows.position[r])
    counts = edits.token_counts[slot].tolist()
    if r < case.rows.num_rows_ar:
        for token in case.rows.token[r + 1 - (position - int(case.cache_seqlens[slot])) : r + 1].tolist():
            counts[token] = max(counts[token], 0) + 1
    row = list(row)
    repetition, presence, frequency = edits.penalties[slot].tolist()
    for t, count in enumerate(counts):
        if count:
            row[t] = row[t] / repetition if row[t] > 0 else row[t] * repetition
        if count > 0:
            row[t] -= presence + frequency * count
    for t, value in zip(edits.bias_ids[slot].tolist(), edits.bias_values[slot].tolist(), strict=True):
        if t >= 0:
            row[t] += value
    if position + 1 < int(edits.min_position[slot]):
        for t in edits.stop_ids[slot].tolist():
            if t >= 0:
                row[t] = -math.inf
    return row


def test_penalties_bias_and_stop_ids_are_their_definition():
    """In every row of blocks. The drafts before a row count too, in AR rows alone. Slot 1 is greedy."""
    case = block_with_edits(200)
    value, index, log_probs = case.run(reference.process_logits)
    seen = set()
    for i, r in enumerate(case.logit_rows.tolist()):
        if case.rows.position[r] < 0:
            assert value[i].tolist() == [0, 0] and index[i].tolist() == [0, 128]
            continue
        slot = int(case.rows.seq[r])
        seen.add(slot)
        row = torch.tensor(edited(case.logits[i].tolist(), case, i), dtype=torch.float64)
        if slot != 1:
            want = torch.tensor(naive_probs(row.tolist(), 1.1, 0, 1.0, 0.0), dtype=torch.float64).log()
            torch.testing.assert_close(log_probs[i].double(), want, rtol=1e-5, atol=1e-5)
        else:
            want = torch.stack([part.max() for part in row.split(128)])
            torch.testing.assert_close(value[i].double(), want, rtol=1e-5, atol=1e-5)
            assert index[i].tolist() == [int(row[:128].argmax()), 128 + int(row[128:].argmax())]
    assert seen == {0, 1, 2}


def test_ids_outside_the_vocabulary():
    check_ids_outside(reference.process_logits)


def test_neighbouring_values():
    check_neighbouring_values(reference.process_logits)


def test_what_top_k_keeps():
    check_what_top_k_keeps(reference.process_logits)


def test_the_outermost_uniforms():
    check_the_outermost_uniforms(reference.process_logits)


def test_the_unlikely():
    check_the_unlikely(reference.process_logits)


def test_philox_known_answers():
    """The vector published with the generator (Salmon et al. 2011) for a counter and a key of zeros."""
    zero = [int(reference.philox(0, 0, 0, t)) for t in range(4)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seeds = [0, 1, 2**32, 2**62 + 5]
    words = {int(reference.philox(s, p, q, t)) for s in seeds for p in (0, 1) for q in (0, 1) for t in range(8)}
    assert len(words) == 4 * 2 * 2 * 8


def test_uniform_is_uniform_and_inside():
    u = reference.uniforms(7, 3, 1, torch.arange(1 << 16))
    assert u.dtype is torch.float32 and u.min() > 0 and u.max() < 1
    histogram = torch.histc(u, 64, 0, 1)
    assert ((histogram - 1024) ** 2 / 1024).sum() < 63 + 5 * math.sqrt(2 * 63)
    assert torch.equal(u[123], reference.uniforms(7, 3, 1, 123))


def test_choices_follow_the_distribution():
    check_draws(reference.process_logits)
