"""Rows of logits with every kind of sampling parameters, for the CPU, interpreter and GPU tiers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from orthrus_rt import reference
from orthrus_rt.filters import filtered_probabilities
from orthrus_rt.rows import Rows
from orthrus_rt.state import SlotEdits, SlotSampling, SlotState, empty_partials, num_score_tiles
from tests.rows import ar, diff, make_rows

# temperature, top_k, top_p, min_p
FILTERS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (1.0, 20, 0.8, 0.0),
    (0.7, 0, 0.95, 0.0),
    (1.5, 50, 1.0, 0.02),
    (0.3, 1, 1.0, 0.0),
    (2.0, 300, 0.5, 0.0),
    (1.0, 10**6, 0.6, 0.01),
    (1.0, 3, 1e-9, 0.0),
    (100.0, 0, 0.9, 0.0),
    (1e-4, 40, 0.9, 0.5),
    (0.0, 5, 0.5, 0.5),
]


@dataclass
class Case:
    """The arguments of process_logits that come before ``purpose``."""

    logits: torch.Tensor
    rows: Rows
    logit_rows: torch.Tensor
    sampling: SlotSampling
    cache_seqlens: torch.Tensor

    def __len__(self):
        return len(self.logit_rows)

    def run(self, implementation, purpose=2):
        """``(value, id, log_probs)`` of ``implementation``; the logits stay unchanged."""
        n, vocab = self.logits.shape
        value, index = empty_partials(n, num_score_tiles(vocab), self.logits.device)
        log_probs = torch.full_like(self.logits, 7.0)
        value.fill_(7.0), index.fill_(-7)
        args = self.logits.clone(), self.rows, self.logit_rows, self.sampling, self.cache_seqlens
        implementation(*args, purpose, (value, index), log_probs=log_probs)
        return value, index, log_probs

    def choose(self, implementation, purpose=2):
        """Choices, as consensus makes them."""
        value, index, _ = self.run(implementation, purpose)
        return choices(value, index)

    def only(self, which) -> Case:
        """The same pass with only some rows of logits."""
        return dataclasses.replace(self, logits=self.logits[which], logit_rows=self.logit_rows[which].contiguous())


def choices(value, index):
    return index.gather(1, reference.first_argmax(value)[:, None])[:, 0]


def with_filters(logits, filters=None, edits=False, device="cpu") -> Case:
    """Row i has a slot of its own, with filter i (they repeat). The pass has one more row, invalid and without logits.
    Row 2, which FILTERS give a top-k and a top-p, is at position 0.

    Slots and pass rows are in opposite orders, so that a mix-up of the two is found.
    """
    n, vocab = logits.shape
    chosen = [(filters or FILTERS)[i % len(filters or FILTERS)] for i in range(n)]
    temperature, top_k, top_p, min_p = zip(*chosen, strict=True)

    def column(values, dtype):
        return torch.tensor(values, dtype=dtype).flip(0)

    position = [0 if i == 2 else 99 + i for i in range(n)]
    at = column(position, torch.int32) + 1
    sampling = SlotSampling(
        column(temperature, torch.float32), column(top_k, torch.int32), column(top_p, torch.float32),
        column(min_p, torch.float32), (torch.arange(n) * 10**12 + 12345).flip(0),
        extras(n, vocab, at) if edits else None,
    )  # fmt: skip
    rows = make_rows([*(ar(n - 1 - i, start, 1) for i, start in enumerate(position)), ar(0, 0, 1, invalid=1)])
    return moved(Case(logits, rows, torch.arange(n, dtype=torch.int32), sampling, at - 1), device)


def moved(value, device):
    """A dataclass with all its tensors, at any depth, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        return type(value)(**{name: moved(item, device) for name, item in vars(value).items()})
    return value


def logits(n, vocab, kind, seed=0):
    """fp32 ``[n, vocab]``: "normal", "peaked" as in language models, "tied" (few values) or "hostile" (NaN, inf)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, vocab, generator=generator)
    if kind == "peaked":
        return x * 1.5 - 8 + 14 * torch.rand(n, vocab, generator=generator) ** 12
    if kind == "tied":
        return (x * 2).round() / 2
    if kind == "hostile":
        x[0::5] = torch.nan
        x[1::5, : vocab // 2] = -torch.inf
        x[1::5, -1] = torch.inf
        x[2::5] = 1e38 * x[2::5]
        x[3::5] = -torch.inf
        x[3::5, vocab // 3] = torch.nan
        x[4::5] = -x[4::5].abs()
        x[4::5, vocab // 3] = -0.0  # the maximum
        return x
    return x * 3


def extras(n, vocab, position) -> SlotEdits:
    """Penalties, bias and stop ids: half the slots choose before their min_position, half at it."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    counts = integers(-6, 4, n, vocab).clamp(min=-1)
    counts[integers(0, 10, n, vocab) > 1] = 0
    penalties = torch.stack([torch.linspace(0.8, 1.5, n), torch.linspace(-0.5, 1, n), torch.linspace(0, 0.4, n)], 1)
    bias_ids = integers(-1, vocab, n, 7)
    bias_ids[:, 3] = bias_ids[:, 2]
    return SlotEdits(
        penalties=penalties, token_counts=counts, num_counted=torch.zeros(n, dtype=torch.int32), bias_ids=bias_ids,
        bias_values=torch.randn(n, 7, generator=generator) * 4, stop_ids=integers(-1, vocab, n, 5),
        min_position=position + torch.arange(n, dtype=torch.int32) % 2,
    )  # fmt: skip


def block_with_edits(vocab, block_len=5) -> Case:
    """A pass of 2 AR blocks and a diffusion block over 3 slots, with penalties. The drafts repeat tokens, some of which
    were in the prompt. A tile's last token and the next one's first have a bias. Slots 0 and 2 sample from the whole
    vocabulary, so that any edit shows.

    Slot 1's last two rows are invalid. All rows but the first have logits, in another order than the rows. The
    diffusion block assumes that two drafts are accepted.
    """
    generator = torch.Generator().manual_seed(0)
    groups = [ar(0, 20, block_len), ar(1, 7, block_len, invalid=2), diff(2, 31 + 2, block_len)]
    rows = make_rows(groups)
    rows.token.copy_(torch.randint(0, min(vocab, 4), (3 * block_len,), generator=generator))
    order = (torch.randperm(3 * block_len - 1, generator=generator) + 1).int()
    sampling = with_filters(torch.zeros(3, vocab), [(1.1, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)], edits=True).sampling
    starts = torch.tensor([g.start for g in groups], dtype=torch.int32)
    sampling.edits.min_position.copy_(starts + 3)
    sampling.edits.stop_ids.copy_(torch.tensor([5, -1, 9, 7, 3]))
    sampling.edits.token_counts[:, :4] = torch.tensor([-1, 0, 2, -1], dtype=torch.int32)[:vocab]
    if vocab > 4096:
        sampling.edits.bias_ids[:, :2] = torch.tensor([4095, 4096])
        sampling.edits.bias_values[:, :2] = 10.0
    cache_seqlens = starts - torch.tensor([0, 0, 2], dtype=torch.int32)
    return Case(logits(len(order), vocab, "normal"), rows, order, sampling, cache_seqlens)


def assert_agrees(case, implementation, purpose=2):
    """Kept tokens, choices and scores are the oracle's: scores up to the last bits of exp and log, but to the bit in
    greedy rows without edits. Scores that are too low to win may be left out.

    Where a cut falls within rounding of a token, that token may be kept or not. All such tokens of a row have less than
    1e-5 of the probability.
    """
    value, index, log_probs = case.run(implementation, purpose)
    want_value, want_index, want_log = case.run(reference.process_logits, purpose)
    got, want = choices(value, index), choices(want_value, want_index)
    assert got.tolist() == want.tolist()
    valid = (case.rows.position[case.logit_rows.long()] >= 0)[:, None]
    disputed = (log_probs.isneginf() != want_log.isneginf()) & valid
    assert torch.where(disputed, torch.maximum(log_probs, want_log).exp(), 0).sum(1).max() < 1e-5
    agreed = valid & ~disputed
    torch.testing.assert_close(log_probs[agreed], want_log[agreed], rtol=1e-5, atol=1e-5)
    padded = torch.nn.functional.pad(disputed, (0, -disputed.shape[1] % 128))
    same = ~padded.view(*value.shape, 128).any(2)
    both = value.isfinite() & want_value.isfinite() & same
    torch.testing.assert_close(value[both], want_value[both], rtol=1e-5, atol=1e-5)
    assert torch.equal(index[both], want_index[both])
    best = want_value.amax(1, keepdim=True).expand_as(value)
    assert (torch.maximum(value, want_value) < best)[same & (value.isfinite() != want_value.isfinite())].all()
    first = 128 * torch.arange(value.shape[1], dtype=torch.int32, device=index.device).expand_as(index)
    assert torch.equal(index[value.isneginf()], first[value.isneginf()])
    if case.sampling.edits is None:  # with edits, a product and a sum may be fused
        greedy = both & (case.sampling.temperature[case.rows.seq[case.logit_rows.long()].long()] == 0)[:, None]
        assert torch.equal(value[greedy], want_value[greedy])
    return got


def check_ids_outside(implementation):
    """Ids outside the vocabulary change nothing in any row, whether of a bias, of stops or of drafts."""
    vocab = 200
    case = block_with_edits(vocab)
    case = case.only(case.rows.position[case.logit_rows.long()] >= 0)
    rows, edits = case.rows, case.sampling.edits
    case.rows = dataclasses.replace(rows, num_rows_ar=0)  # no drafts are counted
    want = case.run(implementation)
    outside = torch.tensor([vocab, 2 * vocab - 1, 2_000_000_000, -5], dtype=torch.int32)
    case.rows = dataclasses.replace(rows, token=outside.repeat(4)[: len(rows.token)])
    edits.bias_ids, edits.stop_ids = (torch.cat([t, outside.expand(3, 4)], 1) for t in (edits.bias_ids, edits.stop_ids))
    edits.bias_values = torch.cat([edits.bias_values, torch.full((3, 4), 9.0)], 1)
    assert all(torch.equal(one, other) for one, other in zip(case.run(implementation), want, strict=True))


def check_neighbouring_values(implementation):
    """A cut separates the two largest values, though no fp32 number lies between them."""
    row = torch.full((1, 300), -5.0)
    row[0, 7] = 5
    row[0, 200] = row[0, 7].nextafter(torch.tensor(0.0))
    for filters in ((1.0, 1, 1.0, 0.0), (1.0, 0, 0.4, 0.0)):
        log_probs = with_filters(row, [filters]).run(implementation)[2]
        assert log_probs.isfinite().nonzero().tolist() == [[0, 7]], filters


def check_what_top_k_keeps(implementation):
    """A value exactly at a rung of the search and alone in its tile; all but one; tokens too unlikely to have mass."""
    at_a_rung, unlikely = torch.full((1, 9001), -90.0), torch.full((1, 9001), -300.0)
    at_a_rung[0, 7], at_a_rung[0, 4500], at_a_rung[0, 9000] = 5, 5 - 0.4375, 4.6
    unlikely[0, 3], unlikely[0, 5000], unlikely[0, 9000] = 0, -50, -40
    all_but_one = torch.tensor([[1.0, 3.0, 2.0]])
    cases = ((at_a_rung, [7, 9000]), (at_a_rung, [7, 4500, 9000]), (unlikely, [3, 5000, 9000]), (all_but_one, [1, 2]))
    for row, want in cases:
        log_probs = with_filters(row, [(1.0, len(want), 1.0, 0.0)]).run(implementation)[2]
        assert log_probs[0].isfinite().nonzero()[:, 0].tolist() == want


def check_the_outermost_uniforms(implementation):
    """The only kept token is chosen, whatever the noise: the words are 0xffffff88, which in fp32 is 2**32, and 0. Two
    others have a u at which a short series for the logarithm would not do.
    """
    keys = (242043, 32, 0xFFFFFF88), (5680720, 45, 0), (106, 123, 0x1FDC5D45), (163, 227, 0x01FF1A33)
    for position, token, word in keys:
        assert int(reference.philox(0, position, 2, token)) == word
        row = torch.full((1, 300), -5.0)
        row[0, token] = 5
        case = with_filters(row, [(1.0, 1, 1.0, 0.0)])
        case.sampling.seed.zero_()
        case.rows.position[0] = position - 1
        value, index, _ = case.run(implementation)
        u = min((word + 0.5) * 2.0**-32, 1 - 2.0**-24)
        assert choices(value, index).tolist() == [token]
        assert float(value.max()) == pytest.approx(5 - math.log(-math.log1p(-u)), abs=1e-5)


def check_the_unlikely(implementation):
    """Mass counts in whole units of 2**-40: 5,500 tokens of 15.5 ... 15.7 units have 15 each. Of these, top-p drops
    2**-24 of the row's mass, whether or not top-k has removed all other tokens. All logits are negative. A second row
    has two tokens whose mass is exactly top-p's share.
    """
    row = torch.full((1, 9001), -100.0)
    row[0, 9000] = -3
    row[0, 1500:7000] = -3 + math.log(15.7) - 40 * math.log(2) - 2e-6 * torch.arange(5500)
    kept = 5500 - (2**16 + 1) // 15
    for top_k in (0, 5501):
        log_probs = with_filters(row, [(1.0, top_k, 1 - 2.0**-24, 0.0)]).run(implementation)[2]
        assert log_probs[0].isfinite().nonzero()[:, 0].tolist() == [*range(1500, 1500 + kept), 9000]
    shared = torch.full((1, 300), -100.0)
    shared[0, [7, 200]], shared[0, 5] = 0, math.log(2**17 + 1.5) - 40 * math.log(2)
    log_probs = with_filters(shared, [(1.0, 0, 1 - 2.0**-24, 0.0)]).run(implementation)[2]
    assert log_probs[0].isfinite().nonzero()[:, 0].tolist() == [7, 200]


def check_count_tokens(op, device="cpu"):
    """Only new tokens are counted, each as often as it occurs, from a ring that wraps or is entirely new. So is a token
    of the prompt, if it is among the new ones; a token outside the vocabulary, or no longer in the ring, is not. The
    edits have a slot more than the state: its counts stay as they are.
    """
    state = SlotState.allocate(5, 4, 9, 1, "cpu")
    state.num_output[4] = 3
    rings = [[5, 6, 5, 5, 7, 0, 0, 0, 0], [2, 3, 4, 9, 9, 9, 9, 3, 1], [8, 8, 7] + [8] * 6, [6] * 8 + [4]]
    state.output[:4] = torch.tensor(rings)
    state.output[2, 3:6] = torch.tensor([10, -3, 2_000_000_000])
    state.num_output[:4] = torch.tensor([5, 12, 12, 250])
    edits = SlotEdits.allocate(5, 10, 1, torch.zeros(5, 1, dtype=torch.int32))
    edits.num_counted.copy_(torch.tensor([1, 7, 3, 0, 0]))
    edits.token_counts[0, 5], edits.token_counts[0, 6], edits.token_counts[0, 0] = 2, -1, -1
    want = edits.token_counts.clone()
    want[0, 5], want[0, 6], want[0, 7] = 4, 1, 1
    want[1, 1:5] = torch.tensor([1, 1, 2, 1], dtype=torch.int32)
    want[2, 7], want[2, 8] = 1, 5
    want[3, 6], want[3, 4] = 8, 1
    state, edits = moved(state, device).view(slice(4)), moved(edits, device)
    for _ in range(2):  # the second time, nothing is new
        op(state, edits)
        assert torch.equal(edits.token_counts.cpu(), want)
        assert edits.num_counted.tolist() == [5, 12, 12, 250, 0]


def check_draws(implementation, device="cpu"):
    """Chi-square test of 20,000 draws, each at another position."""
    n, vocab, filters = 20000, 50, (1.2, 30, 0.95, 0.01)
    row = logits(1, vocab, "normal")
    case = with_filters(row.expand(n, vocab), [filters], device=device)
    case.sampling.seed.fill_(99)
    counts = torch.bincount(case.choose(implementation).cpu(), minlength=vocab)
    expected = filtered_probabilities(row, *filters)[0] * n
    kept = expected > 0
    assert not counts[~kept].any()
    degrees = int(kept.sum()) - 1
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < degrees + 5 * (2 * degrees) ** 0.5
