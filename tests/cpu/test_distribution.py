"""Both acceptance rules give the AR distribution, whatever the drafter does: pairs of tokens are compared with exact
enumeration. Every check can fail, and is shown to fail on bugs that others have published.

Seeds are fixed. A correct rule fails a check with probability 1e-4 (over the choice of seed, once). A published bug
must fail it by far: p < 1e-9.
"""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import chdtrc

from orthrus_rt import ops, rejection
from orthrus_rt import state as st
from orthrus_rt.cycle_plan import CyclePlan
from orthrus_rt.engine import Engine
from orthrus_rt.rejection import RejectionSampler
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints
from tests.table_model import DRAFTERS, SETTINGS, TABLE, VOCAB, remember_probs, two_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST, SIGNIFICANCE, CAUGHT = 0, 1e-4, 1e-9
TWO_PASS, ONE_PASS = CyclePlan("two_pass", 3), CyclePlan("one_pass", 3, 4)


def p_value(pairs, setting) -> float:
    """Chi-square p-value of the observed pairs against enumeration; 0 if an impossible pair occurred."""
    want, got = two_tokens(FIRST, setting).ravel(), np.bincount(pairs @ [VOCAB, 1], minlength=VOCAB**2)
    if got[want == 0].any():
        return 0.0
    expected = want * len(pairs)
    often = expected >= 5  # the rest in one cell, as chi-square requires
    cells = [np.append(x[often], x[(want > 0) & ~often].sum()) for x in (got, expected)]
    cells = [x[cells[1] > 0] for x in cells]
    return chdtrc(len(cells[0]) - 1, ((cells[0] - cells[1]) ** 2 / cells[1]).sum()) if len(cells[0]) > 1 else 1.0


# --- coupled: the engine's own cycle, over a table instead of a network, one slot per trial ----------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = checkpoints.make(
        tmp_path_factory.mktemp("table"), num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, vocab_size=VOCAB, mask_token_id=VOCAB - 1, eos_token_id=0, block_size=3, dtype=torch.bfloat16,
    )  # fmt: skip
    return Engine.from_pretrained(str(folder), device="cpu", mode="two_pass", max_seq_len=64, max_batch_size=4096)


@pytest.fixture
def coupled(engine, monkeypatch):
    """``coupled(drafter, setting)``: pairs ``[slots, 2]`` of two tokens, and whether every first draft was accepted."""

    def pairs(drafter, setting, plan=TWO_PASS):
        tables = {"ar": TABLE, "diffusion": DRAFTERS[drafter]}

        def forward(model, kv, rows, act, workspace, *, logit_rows, epilogue, out, exact):
            assert epilogue == "logits"
            blocks = rows.group_start[rows.num_groups_ar :].long()
            anchor = rows.token[blocks[:-1]].repeat_interleave(blocks.diff())  # a block drafts from its first token
            token = torch.cat([rows.token[: rows.num_rows_ar], anchor])[logit_rows.long()].long()
            is_ar = (logit_rows < rows.num_rows_ar)[:, None]
            out.copy_(torch.where(is_ar, tables["ar"][token], tables["diffusion"][token]))

        monkeypatch.setattr("orthrus_rt.cycle.forward", forward)
        runner = engine.runner
        state, n = runner.state, runner.num_slots
        runner.kv.page_table.fill_(1)
        for name, value in dict(cache_seqlens=1, num_drafts=0, num_output=0, limit=64, finish=st.RUNNING).items():
            getattr(state, name).fill_(value)
        state.stop_ids.fill_(-1)
        full = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | setting
        for name, value in full.items():
            getattr(runner.sampling, name).fill_(value)
        runner.sampling.seed.copy_(torch.arange(n))
        runner.make_room([(plan, runner.num_slots)])
        cycle = runner.cycle(plan, n, runner.sampling)
        cycle.state.block_tokens[:, 0] = FIRST
        cycle.run_eager()
        always_accepted = int(state.num_output.min()) > 1
        while int(state.num_output.min()) < 2:
            cycle.run_eager()
        return state.output[:, :2].numpy(), always_accepted

    return pairs


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_coupled(coupled, drafter, setting):
    pairs, always_accepted = coupled(drafter, setting)
    assert p_value(pairs, setting) > SIGNIFICANCE
    assert always_accepted == (drafter == "equal") or drafter == "nearly_equal"


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_coupled_in_one_pass(coupled, drafter):
    """Drafts for assumed outcomes: which block survives must not depend on what it drafted."""
    for setting in (SETTINGS[0], SETTINGS[-1]):
        pairs, _ = coupled(drafter, setting, ONE_PASS)
        assert p_value(pairs, setting) > SIGNIFICANCE


def without_position(honest):
    """The same noise at every position."""

    def bug(logits, rows, logit_rows, *args):
        frozen = dataclasses.replace(rows, position=torch.zeros_like(rows.position))
        return honest(logits, frozen, logit_rows, *args)

    return bug


def bonus_row_alone(honest):
    """Filters are applied only to the last row of a verified block."""

    def bug(logits, rows, logit_rows, params, seqlens, purpose, partials):
        none = st.SlotSampling.allocate(len(params.seed), "cpu")
        plain = st.SlotSampling(params.temperature, none.top_k, torch.ones_like(none.top_p), none.min_p, params.seed)
        filtered = [p.clone() for p in partials]
        honest(logits.clone(), rows, logit_rows, params, seqlens, purpose, filtered)
        honest(logits, rows, logit_rows, plain, seqlens, purpose, partials)
        if rows.num_rows_ar:
            for got, right in zip(partials, filtered, strict=True):
                got[2::3] = right[2::3]

    return bug


@pytest.mark.parametrize("bug", (without_position, bonus_row_alone))
def test_coupled_bugs_are_caught(coupled, bug, monkeypatch):
    monkeypatch.setattr(ops, "process_logits", bug(ops.process_logits))
    pairs, _ = coupled("equal", {"temperature": 1.0, "top_k": 3})
    assert p_value(pairs, {"temperature": 1.0, "top_k": 3}) < CAUGHT


def test_taking_the_drafts_as_they_are_is_caught(coupled, monkeypatch):
    """A verification that chooses under the drafter's logits accepts everything."""
    monkeypatch.setitem(DRAFTERS, "wrong", TABLE.roll(1, 0))
    monkeypatch.setattr("tests.cpu.test_distribution.TABLE", TABLE.roll(1, 0))
    pairs, _ = coupled("wrong", {"temperature": 1.0})
    assert p_value(pairs, {"temperature": 1.0}) < CAUGHT


# --- rejection: the sampler itself, one pair of positions per trial ----------------------------------


def by_rejection(sampler_type, drafter, setting):
    """The first two tokens of 600 trials at distinct positions, as consensus would emit them."""
    params = SamplingParams(seed=11, **setting)
    sampler = sampler_type(params, params.seed)
    remember_probs(sampler)
    pairs = []
    for position in range(0, 4 * 600, 4):
        tokens = [FIRST]
        while len(tokens) < 3:
            here = position + len(tokens)
            drafts = sampler.draft(DRAFTERS[drafter][tokens[-1]].repeat(2, 1), here).tolist()
            choices = sampler.verify(TABLE[[tokens[-1], *drafts]], drafts, here).tolist()
            accepted = next((i for i, d in enumerate(drafts) if choices[i] != d), len(drafts))
            tokens += choices[: accepted + 1]
        pairs.append(tokens[1:3])
    return np.array(pairs)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("setting", (SETTINGS[0], SETTINGS[-1]), ids=str)
def test_rejection(drafter, setting):
    assert p_value(by_rejection(RejectionSampler, drafter, setting), setting) > SIGNIFICANCE


class SharedStream(RejectionSampler):
    """Published bug: draft, acceptance and recovery draw from one random stream."""

    def draft(self, logits, position):
        self._draft_probs = self._probs(logits)
        ids = [
            rejection.pick(q, rejection.uniform(self.seed, position + i, 0)) for i, q in enumerate(self._draft_probs)
        ]
        return torch.tensor(ids, dtype=torch.int32)

    def verify(self, logits, drafts, position):
        honest, rejection.uniform = rejection.uniform, lambda seed, position, purpose: honest(seed, position, 0)
        try:
            return super().verify(logits, drafts, position)
        finally:
            rejection.uniform = honest


class NoDraftProbs(RejectionSampler):
    """Published bug: without draft probabilities, every draft is taken to be certainly right."""

    def verify(self, logits, drafts, position):
        bonus = rejection.pick(self._probs(logits)[-1], rejection.uniform(self.seed, position + len(drafts), 2))
        return torch.tensor([*drafts, bonus])


@pytest.mark.parametrize("bug", (SharedStream, NoDraftProbs))
def test_rejection_bugs_are_caught(bug):
    setting = {"temperature": 1.0}
    assert p_value(by_rejection(bug, "uniform", setting), setting) < CAUGHT
