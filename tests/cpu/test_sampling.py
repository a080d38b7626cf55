"""The published rejection rule gives the AR distribution whatever the drafter does; and these checks can fail."""

import numpy as np
import pytest
import torch
from scipy import stats

from orthrus_rt import sampling
from orthrus_rt.reference import process_logits_probs
from orthrus_rt.sampling import RejectionSampler, SamplingParams

VOCAB, TRIALS = 6, 4000
P_LOGITS = torch.tensor([[1.0, 0.2, -0.5, 2.0, 0.0, -1.0], [0.3, 0.3, 1.5, -2.0, 0.0, 0.9]])
DRAFTERS = {
    "uniform": torch.zeros(1, VOCAB),
    "adversarial": -3 * P_LOGITS[:1],
    "equal": P_LOGITS[:1],
    "certain": torch.tensor([[0.0, 30.0, 0.0, 0.0, 0.0, 0.0]]),
}
SETTINGS = ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.9})


def first_tokens(sampler_type, params, q_logits, trials=TRIALS):
    """The first token of ``trials`` cycles with one draft each, at distinct positions."""
    sampler = sampler_type(params, params.seed)
    compute, known = sampler._probs, {}

    def cached(logits):  # the same few logits every time
        key = (logits.data_ptr(), len(logits))
        if key not in known:
            known[key] = compute(logits)
        return known[key]

    sampler._probs = cached
    counts = np.zeros(VOCAB)
    for position in range(0, 2 * trials, 2):
        draft = sampler.draft(q_logits, position).tolist()
        counts[sampler.verify(P_LOGITS, draft, position).tolist()[0]] += 1
    return counts


def p_value(counts, params):
    want = process_logits_probs(P_LOGITS[:1], params.temperature, params.top_k, params.top_p, params.min_p)[0].numpy()
    assert counts[want == 0].sum() == 0
    kept = want > 0
    expected = want[kept].astype(np.float64)
    return stats.chisquare(counts[kept], expected / expected.sum() * counts.sum()).pvalue if kept.sum() > 1 else 1.0


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_first_token_has_the_ar_distribution(drafter, setting):
    params = SamplingParams(**({"temperature": 1.0, "seed": 11} | setting))
    assert p_value(first_tokens(RejectionSampler, params, DRAFTERS[drafter]), params) > 1e-4


def test_a_draft_equal_to_ar_is_always_accepted():
    params = SamplingParams(temperature=1.0, seed=1)
    sampler = RejectionSampler(params, params.seed)
    for position in range(200):
        draft = sampler.draft(P_LOGITS[:1], position).tolist()
        assert sampler.verify(P_LOGITS, draft, position).tolist()[0] == draft[0]


class SharedStream(RejectionSampler):
    """Published bug: draft, acceptance and recovery draw from one random stream."""

    def draft(self, logits, position):
        self._u = sampling.uniform(self.seed, position, 0)
        self._draft_probs = self._probs(logits)
        return torch.tensor([sampling.pick(self._draft_probs[0], self._u)], dtype=torch.int32)

    def verify(self, logits, drafts, position):
        p, q, token = self._probs(logits)[0], self._draft_probs[0], drafts[0]
        if self._u * q[token] < p[token]:
            return torch.tensor(drafts)
        return torch.tensor([sampling.pick((p - q).clamp(min=0), self._u)])


class FallsBackToP(RejectionSampler):
    """Published bug: after a rejection the recovery token comes from p, not from the residual."""

    def verify(self, logits, drafts, position):
        p, q, token = self._probs(logits)[0], self._draft_probs[0], drafts[0]
        if sampling.uniform(self.seed, position, sampling.ACCEPT) * q[token] < p[token]:
            return torch.tensor(drafts)
        return torch.tensor([sampling.pick(p, sampling.uniform(self.seed, position, sampling.RECOVER))])


class MissingDraftProbs(RejectionSampler):
    """Published bug: without draft probabilities every draft counts as certain to be right."""

    def verify(self, logits, drafts, position):
        return torch.tensor(drafts)


@pytest.mark.parametrize("bug", (SharedStream, FallsBackToP, MissingDraftProbs))
def test_the_check_catches_published_bugs(bug):
    params = SamplingParams(temperature=1.0, seed=11)
    assert p_value(first_tokens(bug, params, DRAFTERS["uniform"]), params) < 1e-6


def test_noise_is_keyed_not_ordered():
    u = {(s, p, k): sampling.uniform(s, p, k) for s in (0, 1) for p in (0, 1, 2) for k in range(3)}
    assert len(set(u.values())) == len(u)
    assert all(sampling.uniform(*key) == value for key, value in reversed(u.items()))


def test_nan_logits_raise():
    sampler = RejectionSampler(SamplingParams(temperature=1.0), 0)
    with pytest.raises(FloatingPointError, match="the logits contain NaN"):
        sampler.draft(torch.full((1, VOCAB), torch.nan), 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ({"top_k": -1}, r"top_k must be in \[0, 2\*\*31\), got -1"),
        ({"top_k": 2**40}, r"top_k must be in \[0, 2\*\*31\)"),
        ({"max_new_tokens": 5.5}, "max_new_tokens must be an integer, got 5.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1.0"),
        ({"seed": -3}, "seed must be None or in"),
        ({"acceptance": "hope"}, "acceptance must be 'coupled' or 'rejection', got 'hope'"),
        ({"stop_token_ids": (-1,)}, r"stop_token_ids must be all in \[0, 2\*\*31\)"),
    ],
)
def test_bad_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**kwargs)
