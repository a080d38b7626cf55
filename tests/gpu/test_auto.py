"""``mode="auto"`` on CUDA: events time the cycles, results are a cycle late, and no token changes."""

import contextlib

import pytest
import torch

from orthrus_rt.auto import Auto
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints

pytestmark = pytest.mark.gpu

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3]]
GREEDY = SamplingParams(max_new_tokens=100, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=60, temperature=0.8, seed=5, ignore_eos=True)


@pytest.fixture
def auto(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # for the measured costs
    kwargs = dict(dtype=torch.bfloat16, diff_noise=0.02, vocab_size=700, mask_token_id=699)
    folder = checkpoints.make(tmp_path / "tiny", **kwargs)
    with contextlib.closing(
        Engine.from_pretrained(str(folder), device="cuda", max_seq_len=256, max_batch_size=4)
    ) as engine:
        yield engine


@pytest.mark.parametrize("warm", (True, False))
def test_tokens_costs_and_acceptance(auto, warm):
    """Tokens equal those of ar, and the policy receives every cycle with its time on the device."""
    if warm:
        auto.warmup()
    for params in (GREEDY, SAMPLED):
        want = [o.token_ids for o in auto.generate(PROMPTS, params, mode="ar")]
        for _ in range(3):
            assert [o.token_ids for o in auto.generate(PROMPTS, params)] == want
    torch.cuda.synchronize()
    auto.generate(PROMPTS[0], SamplingParams(max_new_tokens=4, ignore_eos=True))  # takes results still in flight
    policy = auto._autos[auto._plan].policy
    policy.settle()
    facts = auto.explain(3)
    assert facts["candidates"]["ar"]["cost_measured"] and facts["spent_seconds"] > 0
    assert sum(policy.plan_counts.values()) > 100 and len(policy._pending) <= 1
    # A cycle of two layers takes the device tens of microseconds; waits for the host would show.
    assert 1e-6 < facts["candidates"]["ar"]["seconds_per_cycle"] < 5e-3


def test_costs_are_kept(auto, monkeypatch):
    """A second engine of this model and device reads what the first one measured, and checks once whether it holds."""
    auto.warmup()
    table = auto._autos[auto._plan].policy.costs.table()
    assert {(1, "ar"), (4, "ar"), (1, "two_pass")} <= {(row[0], row[1]) for row in table}
    auto.close()
    looks, seconds = [], Auto._seconds
    monkeypatch.setattr(Auto, "_seconds", lambda self, cycle: looks.append(seconds(self, cycle)) or looks[-1])
    again = Engine(
        auto.checkpoint, device=auto.device, dtype=torch.bfloat16, mode="auto", max_seq_len=256, draft_len=None,
        fan_out=None, max_batch_size=4, num_pages=None, prefix_caching=True,
    )  # fmt: skip
    with contextlib.closing(again):
        again.warmup()
        costs = again._autos[again._plan].policy.costs
        now, before = ({tuple(row[:-1]): row[-1] for row in t} for t in (costs.table(), table))
        assert 0 < len(looks) <= len(now) and now.keys() >= before.keys()  # other plans may seem worthwhile by then
        assert all(0.1 < now[plan] / before[plan] < 10 for plan in before)
        again.generate(PROMPTS, GREEDY)


def test_steps_never_wait(auto):
    """Runs whole steps under sync-debug mode, whatever plan each of them uses."""
    auto.warmup()
    for _ in range(2):  # acceptance learnt, mailboxes allocated
        auto.generate(PROMPTS, GREEDY)
    for prompt in PROMPTS:
        auto.submit(prompt, GREEDY)
    for _ in range(3):
        auto.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            auto.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while auto.has_unfinished():
        auto.step()
