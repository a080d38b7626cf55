"""The published rejection rule, integrated exactly over its random numbers: it emits the AR distribution to 1e-8. That
catches bugs far smaller than any number of samples would show.

Draft, acceptance and recovery are step functions of one uniform number each; bisection finds the steps.
"""

import numpy as np
import pytest
import torch

from orthrus_rt import rejection
from orthrus_rt.rejection import RejectionSampler
from orthrus_rt.sampling import SamplingParams
from tests.table_model import DRAFTERS, SETTINGS, TABLE, VOCAB, distribution, remember_probs

ROWS = TABLE[:2]  # the AR logits that verify a draft, and those of the bonus token
EXACT = 1e-8


def measures(step, low=0.0, high=1.0, at_low=None, at_high=None) -> dict:
    """How much of [0, 1) a monotone step function spends on each of its values."""
    at_low = step(low) if at_low is None else at_low
    at_high = step(np.nextafter(high, 0)) if at_high is None else at_high
    if at_low == at_high:
        return {at_low: high - low}
    middle = (low + high) / 2
    if high - low < 1e-11:
        return {at_low: middle - low, at_high: high - middle}
    at_middle = step(middle)
    total = measures(step, low, middle, at_low, at_middle)
    for value, measure in measures(step, middle, high, at_middle, at_high).items():
        total[value] = total.get(value, 0.0) + measure
    return total


class Integral:
    """One draft and its verification as functions of the three random numbers."""

    def __init__(self, sampler_type, setting, draft_logits, monkeypatch):
        self.u = [0.0, 0.0, 0.0]
        monkeypatch.setattr(rejection, "uniform", lambda seed, position, purpose: self.u[purpose])
        self.sampler = sampler_type(SamplingParams(seed=0, **setting), 0)
        remember_probs(self.sampler)
        self.draft_logits = draft_logits

    def drafted(self, u) -> int:
        self.u[rejection.DRAFT] = u
        return int(self.sampler.draft(self.draft_logits, 0)[0])

    def emitted(self, draft, u_accept, u_recover) -> int:
        self.u[rejection.ACCEPT], self.u[rejection.RECOVER] = u_accept, u_recover
        return int(self.sampler.verify(ROWS, [draft], 0)[0])

    def output(self) -> np.ndarray:
        """Exact distribution of the first emitted token."""
        out = np.zeros(VOCAB)
        for draft, share in measures(self.drafted).items():
            kept = measures(lambda u, d=draft: self.emitted(d, u, 0.5) == d)
            out[draft] += share * kept.get(True, 0.0)
            if kept.get(False, 0.0):
                recovered = measures(lambda u, d=draft: self.emitted(d, np.nextafter(1, 0), u))
                for token, measure in recovered.items():
                    out[token] += share * kept[False] * measure
        return out


def error(sampler_type, setting, drafter, monkeypatch) -> float:
    """Largest difference between the rule's output and the distribution that its own AR probabilities give."""
    integral = Integral(sampler_type, setting, DRAFTERS[drafter][:1], monkeypatch)
    return float(np.abs(integral.output() - RejectionSampler._probs(integral.sampler, ROWS)[0].numpy()).max())


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_rule_is_exact(setting, drafter, monkeypatch):
    assert error(RejectionSampler, setting, drafter, monkeypatch) < EXACT
    probs = RejectionSampler(SamplingParams(seed=0, **setting), 0)._probs(TABLE)
    for row, logits in zip(probs.numpy(), TABLE, strict=True):
        np.testing.assert_allclose(row, distribution(logits, **setting), atol=1e-6)


class Mutant(RejectionSampler):
    """The rule, with steps for a subclass to get wrong."""

    def accepts(self, p, q, token, u) -> bool:
        return bool(p[token] > 0 and u * q[token] < p[token])

    def residual(self, p, q):
        return (p - q).clamp(min=0)

    def verify(self, logits, drafts, position):
        (token,), probs = drafts, self._probs(logits)
        p, q = probs[0], self._draft_probs[0]
        if self.accepts(p, q, token, rejection.uniform(self.seed, position, rejection.ACCEPT)):
            bonus = rejection.pick(probs[1], rejection.uniform(self.seed, position + 1, rejection.RECOVER))
            return torch.tensor([token, bonus])
        return torch.tensor(
            [rejection.pick(self.residual(p, q), rejection.uniform(self.seed, 0, rejection.RECOVER)), 0]
        )


class Bf16Ratio(Mutant):
    """Published bug: the ratio in bf16."""

    def accepts(self, p, q, token, u):
        return bool(u < p[token].bfloat16() / q[token].bfloat16())


class Bf16Draft(Mutant):
    """Published bug: the draft sampled from bf16 probabilities, the ratio computed with the unrounded ones."""

    def draft(self, logits, position):
        self._draft_probs = self._probs(logits)
        rounded = self._draft_probs[0].bfloat16().double()
        return torch.tensor([rejection.pick(rounded, rejection.uniform(self.seed, position, rejection.DRAFT))])


class FallsBackToP(Mutant):
    """Published bug: the recovery token comes from p."""

    def residual(self, p, q):
        return p


class SmallResidualFallsBackToP(Mutant):
    """Published bug: the recovery token comes from p where the residual sums to almost nothing."""

    def residual(self, p, q):
        residual = super().residual(p, q)
        return residual if residual.sum() > 1e-3 else p


class ZeroAccepts(Mutant):
    """Published bug: u = 0 accepts what p forbids."""

    def accepts(self, p, q, token, u):
        return bool(u * q[token] <= p[token])


@pytest.mark.parametrize(
    ("bug", "drafter"),
    [
        (Bf16Ratio, "uniform"),
        (Bf16Draft, "equal"),
        (FallsBackToP, "uniform"),
        (SmallResidualFallsBackToP, "nearly_equal"),
    ],
)
def test_published_bugs_are_caught(bug, drafter, monkeypatch):
    setting = {"temperature": 1.0}
    assert error(Mutant, setting, drafter, monkeypatch) < EXACT
    assert error(bug, setting, drafter, monkeypatch) > 100 * EXACT


def forbidden_accepted(sampler_type, monkeypatch) -> list[int]:
    """Drafts that p forbids (top_k 3) and that are emitted when every random number is 0."""
    integral = Integral(sampler_type, {"temperature": 1.0, "top_k": 3}, DRAFTERS["uniform"][:1], monkeypatch)
    integral.drafted(0.0)
    p = integral.sampler._probs(ROWS)[0]
    return [t for t in range(VOCAB) if p[t] == 0 and integral.emitted(t, 0.0, 0.0) == t]


def test_u_of_zero_accepts_nothing_forbidden(monkeypatch):
    assert forbidden_accepted(RejectionSampler, monkeypatch) == []
    assert forbidden_accepted(ZeroAccepts, monkeypatch) != []


def test_a_draft_equal_to_ar_is_always_accepted():
    params = SamplingParams(temperature=1.0, seed=1)
    sampler = RejectionSampler(params, params.seed)
    for position in range(200):
        draft = sampler.draft(ROWS[:1], position).tolist()
        assert sampler.verify(ROWS, draft, position).tolist()[0] == draft[0]
