"""Sampling parameters and the keyed noise of the rejection rule, whose distribution is tested by
``test_distribution.py`` and ``test_rejection_exact.py``.
"""

import numpy as np
import pytest
import torch

from orthrus_rt import rejection
from orthrus_rt.rejection import RejectionSampler
from orthrus_rt.sampling import SamplingParams

VOCAB = 6


def test_noise_is_keyed_not_ordered():
    u = {(s, p, k): rejection.uniform(s, p, k) for s in (0, 1) for p in (0, 1, 2) for k in range(3)}
    assert len(set(u.values())) == len(u)
    assert all(rejection.uniform(*key) == value for key, value in reversed(u.items()))


def test_nan_of_the_drafter_is_one_bad_draft_and_of_the_ar_view_an_id_that_consensus_does_not_take():
    sampler = RejectionSampler(SamplingParams(temperature=1.0), 0)
    nan, fine = torch.full((2, VOCAB), torch.nan), torch.zeros(2, VOCAB)
    for verified in (fine, nan):
        drafts = sampler.draft(nan[:1], 0).tolist()
        assert drafts == [0]
        assert all(0 <= token < VOCAB for token in sampler.verify(verified, drafts, 0).tolist())


def test_what_only_rounding_would_reject_is_accepted(monkeypatch):
    sampler = RejectionSampler(SamplingParams(temperature=1.0), 0)
    sampler.draft(torch.zeros(1, VOCAB), 0)
    sampler._draft_probs += 1e-9  # nothing is left of p - q
    monkeypatch.setattr(rejection, "uniform", lambda *_: 1 - 2**-53)
    assert sampler.verify(torch.zeros(2, VOCAB), [3], 0).tolist() == [3, VOCAB - 1]


def test_no_rounding_picks_what_has_no_weight():
    assert rejection.pick(torch.tensor([0.0, 5e-324, 0.0], dtype=torch.float64), 1 - 2**-53) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0, or finite and >= 1e-6, got -1.0"),
        ({"temperature": 1e-7}, "temperature must be 0, or finite and >= 1e-6, got 1e-07"),
        ({"temperature": float("nan")}, "temperature must be 0, or finite and >= 1e-6, got nan"),
        ({"top_k": -1}, r"top_k must be in \[0, 2\*\*31\), where 0 keeps all, got -1"),
        ({"top_k": 2**40}, r"top_k must be in \[0, 2\*\*31\)"),
        ({"max_new_tokens": 5.5}, "max_new_tokens must be an integer, got 5.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, got True"),
        ({"seed": False}, "seed must be an integer, got False"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_p": True}, "top_p must be a number, got True"),
        ({"stop_token_ids": [True]}, "stop_token_ids: every id must be an integer, got True"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1.0"),
        ({"seed": -3}, "seed must be None or in"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of integers, got 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list of integers, got '5'"),
        ({"stop_token_ids": b"5"}, "stop_token_ids must be a list of integers, got b'5'"),
        ({"logit_bias": None}, "logit_bias must be {token id: value}, got None"),
        ({"logit_bias": "ab"}, "logit_bias must be {token id: value}, got 'ab'"),
        ({"logit_bias": [1, 2]}, r"logit_bias must be {token id: value}, got \[1, 2\]"),
        ({"temperature": 1e39}, "temperature must be 0, or finite and >= 1e-6, got 1e\\+39"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be finite and > 0, got 1e\\+39"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty must be finite and > 0, got 1e-46"),
        ({"top_p": 1e-46}, r"top_p must be in \(0, 1\], got 1e-46"),
        ({"logit_bias": {1: 1e39}}, "logit_bias must be finite values for ids"),
        ({"logit_bias": {1: -1e39}}, "logit_bias must be finite values for ids"),
        ({"logit_bias": {"5": 1}}, "SamplingParams: logit_bias: every token id must be an integer, got '5'"),
        ({"logit_bias": {1: "a"}}, "logit_bias must be a number, got 'a'"),
        ({"temperature": 10**400}, "temperature must be 0, or finite and >= 1e-6, got inf"),
        ({"min_p": -(10**400)}, r"min_p must be in \[0, 1\), got -inf"),
        ({"logit_bias": {1: 10**400}}, "logit_bias must be finite values for ids"),
        ({"stop_token_ids": np.array(5)}, r"stop_token_ids must be a list of integers, got array\(5\)"),
        ({"stop_token_ids": torch.tensor(5)}, r"stop_token_ids must be a list of integers, got tensor\(5\)"),
        ({"ignore_eos": "false"}, "ignore_eos must be True or False, got 'false'"),
        ({"acceptance": "hope"}, "acceptance must be 'coupled' or 'rejection', got 'hope'"),
        ({"stop_token_ids": (-1,)}, r"stop_token_ids must be all in \[0, 2\*\*31\)"),
    ],
)
def test_bad_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**kwargs)
