"""``acceptance="rejection"`` through the engine: three tokens of many requests against the AR view's own distribution.

What test_distribution.py cannot see of RejectionSampler's callers: keys of random numbers, logits that are processed
twice or too early. Seeds are fixed; a correct rule fails for one in 10,000 choices of them.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import chdtrc

from orthrus_rt import dispatch, ops
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints, engines

pytestmark = pytest.mark.native

PROMPT, TEMPERATURE, REQUESTS, SIGNIFICANCE = [1, 2, 3], 1.7, 2400, 1e-4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = checkpoints.make(tmp_path_factory.mktemp("rejection"), dtype=torch.float32, diff_noise=0.05)
    return engines.make(str(folder), max_seq_len=64, max_batch_size=32, mode="two_pass", dtype="float32")


@pytest.fixture(scope="module")
def texts(engine):
    params = [
        SamplingParams(3, temperature=TEMPERATURE, seed=seed, ignore_eos=True, acceptance="rejection")
        for seed in range(REQUESTS)
    ]
    outs = engine.generate([PROMPT] * REQUESTS, params, draft_len=3)  # one draft more than there is ever room for
    assert sum(sum(out.stats.accepted[1:]) for out in outs) > REQUESTS / 10  # drafts count among the tokens
    return [tuple(out.token_ids) for out in outs]


@pytest.mark.parametrize("index", (0, 1, 2))
def test_a_token_is_distributed_as_in_ar(engine, texts, index):
    """Given the tokens before it, for the most common of these prefixes."""
    statistic = freedom = 0
    for prefix, count in Counter(text[:index] for text in texts).most_common(12):
        want = count * torch.softmax(engine.next_logits([*PROMPT, *prefix]).double() / TEMPERATURE, 0).numpy()
        got = np.bincount([text[index] for text in texts if text[:index] == prefix], minlength=len(want))
        often = want >= 5  # the rest in one cell, as chi-square requires
        want, got = (np.append(x[often], x[~often].sum()) for x in (want, got))
        if want[-1] >= 5 and len(want) > 1:
            statistic, freedom = statistic + ((got - want) ** 2 / want).sum(), freedom + len(want) - 1
    assert freedom > 5 and chdtrc(freedom, statistic) > SIGNIFICANCE


def test_no_python_per_layer(engine, monkeypatch):
    params = SamplingParams(8, temperature=TEMPERATURE, seed=0, ignore_eos=True, acceptance="rejection")
    want, calls = engine.generate([PROMPT], [params], draft_len=3)[0], Counter()
    for op in dispatch.OPS:
        monkeypatch.setattr(ops, op, count(getattr(ops, op), calls, op))
    got = engine.generate([PROMPT], [params], draft_len=3)[0]
    cycles = got.stats.cycles
    assert (got.token_ids, cycles) == (want.token_ids, want.stats.cycles)
    assert 0 < cycles < calls["consensus"] <= 3 * cycles + 3 and calls["process_logits"] <= 2 * cycles + 1
    assert calls["row_linear"] <= 4 * engine.config.num_layers + 1  # those of the prompt


def count(op, calls, name):
    def counted(*args, **kwargs):
        calls[name] += 1
        return op(*args, **kwargs)

    return counted


def test_the_seed_is_the_requests(texts):
    assert len(set(texts)) > 20
