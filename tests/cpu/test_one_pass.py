"""One pass per cycle: what consensus drafts next, and that the engine's tokens equal those of every other mode."""

import pytest
import torch

from orthrus_rt import prompts, reference
from orthrus_rt import state as st
from orthrus_rt.cycle_plan import MODES, CyclePlan, cycle_plan
from orthrus_rt.engine import Engine
from orthrus_rt.reference_consensus import DOUBT, SEEN_GAIN, pick_hypotheses
from orthrus_rt.request import Request
from orthrus_rt.rows import Layout, empty_rows
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints
from tests.pins import UNLESS_SLOW, of_this_isa

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
MASK = 99
K, F = 4, 3


def make_state(drafts, hypotheses, *, cached=10, limit=40):
    """One running slot that verifies ``drafts`` after token 5, with blocks drafted for ``hypotheses``."""
    state = st.SlotState.allocate(1, K, 16, 2, "cpu", max_fan_out=F)
    state.cache_seqlens[0], state.limit[0], state.finish[0] = cached, limit, st.RUNNING
    state.block_tokens[0, : 1 + len(drafts)] = torch.tensor([5, *drafts])
    state.num_drafts[0] = len(drafts)
    state.draft_prob[0, 1:] = torch.tensor([0.6, 0.3, 0.1])
    state.runner_up[0, 1:] = torch.tensor([70, 80])
    state.hypotheses[0] = torch.tensor(hypotheses)
    return state


def run(state, ar, *blocks, next_pass=st.NEXT_ONE_PASS):
    """One consensus of the AR and the blocks' choices (second choice: the id + 100, at half the probability)."""
    choices = torch.tensor([*ar, *(token for block in blocks for token in block)], dtype=torch.int32)
    ids = torch.stack([choices, choices + 100, choices + 200], 1).int()
    value = torch.tensor([1.0, 0.5, 0.25]).log().expand(len(choices), -1).contiguous()
    rows = empty_rows(Layout(1, K, F, K), "cpu")
    reference.consensus(state, (value, ids), st.STEP_VERIFY_AND_DRAFT, next_pass, rows, MASK, K, F)
    return rows


def drafts_of(state):
    return state.block_tokens[0, 1 : 1 + int(state.num_drafts[0])].tolist()


def test_a_block_behind_the_true_bonus_gives_what_a_draft_pass_would():
    state = make_state([6, 7, 8], [[1, 42], [1, -1], [0, -1]])
    run(state, [6, 42, 0, 0], [50, 51, 52, 53], [42, 61, 62, 63], [0] * 4)
    assert int(state.num_accepted[0]) == 1 and int(state.num_verified[0]) == 3
    assert state.block_tokens[0, 0] == 42 and drafts_of(state) == [50, 51, 52]
    assert state.draft_prob[0, 1].tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert state.runner_up[0, 1].tolist() == [150, 250]


@pytest.mark.parametrize("guess", [42, 43])
def test_a_block_with_the_bonus_unseen_drafts_behind_it(guess):
    state = make_state([6, 7, 8], [[1, 41], [1, -1], [0, -1]])
    run(state, [6, 42, 0, 0], [50, 51, 52, 53], [guess, 61, 62, 63], [0] * 4)
    assert state.block_tokens[0, 0] == 42 and drafts_of(state) == [61, 62, 63]
    assert float(state.draft_prob[0, 1, 0]) == pytest.approx(4 / 7 * (1 if guess == 42 else DOUBT))


def test_a_miss_keeps_the_drafts_behind_the_rejected_one():
    state = make_state([6, 7, 8], [[0, -1], [2, -1], [3, -1]])
    rows = run(state, [9, 0, 0, 0], *[[0] * 4] * 3, next_pass=st.NEXT_NONE)
    assert rows.position.tolist() == [-1] * (K + F * K)  # nothing staged
    state = make_state([6, 7, 8], [[1, -1], [2, -1], [3, -1]])
    run(state, [9, 0, 0, 0], *[[0] * 4] * 3)
    assert int(state.num_accepted[0]) == 0 and state.block_tokens[0, 0] == 9 and drafts_of(state) == [7, 8]
    assert state.draft_prob[0, 1].tolist() == pytest.approx([0.6 * DOUBT, 0.3, 0.1])


def test_rows_of_the_next_pass():
    state = make_state([6, 7, 8], [[3, -1]] * 3, limit=17)
    rows = run(state, [6, 7, 8, 42], [60, 61, 62, 63], *[[0] * 4] * 2)
    # Position 14 holds the bonus; the limit leaves room for drafts of positions 15 and 16.
    assert rows.token[:K].tolist() == [42, 61, 62, 0] and rows.position[:K].tolist() == [14, 15, 16, -1]
    for f in range(F):
        accepted, anchor = state.hypotheses[0, f].tolist()
        start = 14 + accepted + (anchor >= 0)
        block = slice(K + f * K, K + (f + 1) * K)
        valid = [start + i < 17 for i in range(K)]
        first = anchor if anchor >= 0 else [42, 61, 62][accepted]
        assert rows.position[block].tolist() == [start + i if v else -1 for i, v in enumerate(valid)]
        assert rows.prefix_len[block].tolist() == [start if v else 0 for v in valid]
        assert rows.token[block].tolist() == [(MASK if i else first) if v else 0 for i, v in enumerate(valid)]


def test_drafts_do_not_outlive_a_change_of_plan():
    state = make_state([6, 7, 8], [[3, -1]] * 3)
    rows = empty_rows(Layout(1, 3), "cpu")
    reference.consensus(state, (None, None), st.STEP_STAGE, st.NEXT_VERIFY, rows, MASK, 3)
    assert drafts_of(state) == [6, 7] and rows.token.tolist() == [5, 6, 7]
    rows = empty_rows(Layout(1, 1), "cpu")
    reference.consensus(state, (None, None), st.STEP_STAGE, st.NEXT_AR, rows, MASK, 1)
    assert drafts_of(state) == [] and rows.token.tolist() == [5]


def test_hypotheses_are_picked_by_gain():
    drafts, runner_up = [1, 2], torch.tensor([[10, 11], [20, 21]])
    prob = torch.tensor([[0.9, 0.05, 0.02], [0.4, 0.35, 0.1]])
    # P: two accepted 0.36; the second rejected 0.54, of which its runner-up 0.315; the first rejected 0.1.
    gains = {(2, -1): 0.36, (1, -1): 0.54, (1, 20): 0.315 * SEEN_GAIN}
    first = pick_hypotheses(drafts, runner_up, prob, 1)
    assert first == [max(gains, key=gains.get)] == [(1, -1)]
    # With (1, -1) picked, the runner-up adds only what seeing the bonus adds.
    assert pick_hypotheses(drafts, runner_up, prob, 3) == [(1, -1), (2, -1), (1, 20)]
    everything = pick_hypotheses(drafts, runner_up, prob, 9)
    assert len(set(everything[:7])) == 7 and everything[7:] == [(-1, -1)] * 2
    assert pick_hypotheses([], runner_up[:0], prob[:0], 2) == [(0, -1), (-1, -1)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Many of its drafts are accepted, and the same ones on any CPU variant. Without attention in the diffusion view,
    or with another mask token, hardly any are.
    """
    kwargs = dict(seed=110, diff_noise=0.05, vocab_size=24, mask_token_id=23, head_dim=32)
    folder = str(checkpoints.make(tmp_path_factory.mktemp("one_pass"), **kwargs))
    return Engine.from_pretrained(folder, device="cpu", mode="two_pass", dtype="float32", max_seq_len=512)


def greedy(engine, n=40, prompt=PROMPT, **kwargs):
    return engine.generate(prompt, SamplingParams(max_new_tokens=n, ignore_eos=True), **kwargs)


# Cycles for 60 tokens, by draft_len and fan_out. If no draft is accepted, there are 59, as the prefill yields a token.
CYCLES = {(1, 1): 45, (1, 2): 43, (1, 4): 43, (2, 1): 39, (2, 2): 39, (2, 4): 39, (7, 1): 34, (7, 2): 33, (7, 4): 33}


@pytest.mark.parametrize(("draft_len", "fan_out"), CYCLES)
def test_the_tokens_of_ar(tiny, draft_len, fan_out):
    want = greedy(tiny, 60, mode="ar").token_ids
    out = greedy(tiny, 60, mode="one_pass", draft_len=draft_len, fan_out=fan_out)
    s = out.stats
    assert out.token_ids == want
    assert (s.mode, s.block_len, s.fan_out, s.passes) == ("one_pass", draft_len + 1, fan_out, s.cycles)
    assert sum(s.accepted) == s.cycles == CYCLES[draft_len, fan_out]
    cycle = tiny.runner.cycle(CyclePlan("one_pass", draft_len + 1, fan_out), 1)
    assert cycle.passes[-1].rows.blocks_per_seq == fan_out  # blocks for which a GPU may read the cache together


def test_any_plan_may_follow_any_other(tiny):
    """The plan changes before every cycle, in the middle of sequences that share a batch."""
    jobs = [([3, 1, 4, 1, 5][:n], SamplingParams(max_new_tokens=30 + n, ignore_eos=True)) for n in (1, 3, 5)]
    want = [tiny.generate(p, q, mode="ar").token_ids for p, q in jobs]
    plans = [
        cycle_plan("one_pass", 7, 4, tiny.config), cycle_plan("two_pass", 3, None, tiny.config),
        cycle_plan("one_pass", 2, 2, tiny.config), cycle_plan("one_pass", 7, 1, tiny.config),
        cycle_plan("ar", 7, None, tiny.config), cycle_plan("two_pass", 7, None, tiny.config),
    ]  # fmt: skip
    tiny.runner.make_room([(plan, tiny.runner.num_slots) for plan in plans])
    names = [tiny.submit(p, q) for p, q in jobs]
    got, paces, step = {name: [] for name in names}, {}, 0
    while tiny.has_unfinished():
        tiny._plan = plans[step * 5 % 7 % len(plans)]
        for out in tiny.step():
            got[out.request_id] += out.new_token_ids
            if out.finished:
                paces[out.request_id] = out.stats.accepted, out.stats.misses
        step += 1
    assert [got[name] for name in names] == want
    assert [paces[name] for name in names] == [
        ([8, 0, 5, 2, 0, 0, 0, 0], 6), ([16, 2, 3, 1, 0, 0, 0, 0], 9), ([24, 5, 0, 0, 0, 0, 0, 0], 12)
    ]  # fmt: skip


def test_options_are_checked(tiny):
    for options, message in (
        (dict(mode="one_pass", draft_len=7, fan_out=0), "fan_out must be within [1, 22] for draft_len 7, got 0"),
        (dict(mode="one_pass", draft_len=1, fan_out=5), "fan_out must be within [1, 4] for draft_len 1, got 5"),
        (dict(mode="both"), "mode must be one of auto, ar, two_pass, one_pass, got 'both'"),
    ):
        with pytest.raises(ValueError) as error:
            greedy(tiny, **options)
        assert message in str(error.value)
    rejection = SamplingParams(temperature=1.0, acceptance="rejection")
    with pytest.raises(ValueError, match="belongs to mode two_pass alone, got mode 'one_pass'"):
        tiny.generate(PROMPT, rejection, mode="one_pass")
    assert cycle_plan("one_pass", 1, None, tiny.config) == CyclePlan("one_pass", 2, 4)
    assert [cycle_plan(mode, None, None, tiny.config).label for mode in MODES] == ["ar", "two_pass/7", "one_pass/7x6"]
    assert [tiny.make_plan(mode).label for mode in MODES] == ["ar", "two_pass/3", "one_pass/3x2"]  # on a CPU
    assert tiny.make_plan("auto") == CyclePlan("auto", 8)
    for fan_out, drafts in ((10, 3), (11, 4), (22, 7)):  # as many as these blocks need
        assert tiny.make_plan("one_pass", None, fan_out).label == f"one_pass/{drafts}x{fan_out}"
        assert tiny.make_plan("two_pass", None, fan_out).label == "two_pass/3"
    for mode in MODES:
        with pytest.raises(ValueError, match=r"fan_out must be within \[1, 22\] for at most 7 drafts per cycle, "):
            tiny.make_plan(mode, None, 23)
    assert MODES == ("ar", "two_pass", "one_pass")


# Tokens per one-pass cycle, that is per read of the weights: greedy, bf16, 4 prompts, 40 tokens.
PINNED = {
    "avx512_bf16": {("code", 7, 2): 2.026, ("chat", 15, 6): 2.08},
    "amx_bf16": {("code", 7, 2): 2.167, ("chat", 15, 6): 2.08},
    "neon": {("code", 7, 2): 2.053, ("chat", 15, 6): 2.053},
    "avx512": {("code", 7, 2): 2.108, ("chat", 15, 6): 2.08},
}


# The same per cycle with a CPU's default numbers of drafts and blocks, 4 prompts of code.
PINNED_DEFAULTS = {
    "avx512_bf16": {"two_pass": 2.69, "one_pass": 1.857},
    "amx_bf16": {"two_pass": 2.836, "one_pass": 1.926},
    "neon": {"two_pass": 2.836, "one_pass": 1.88},
    "avx512": {"two_pass": 2.836, "one_pass": 1.88},
}


def tokens_per_cycle(kind, **how) -> float:
    """With the embedded model, whose tokens are checked against those of AR decoding."""
    engine = Engine.from_pretrained("smollm2-135m", device="cpu", mode="two_pass", max_seq_len=512, max_batch_size=4)
    ids = [p.encode(engine.tokenizer) for p in prompts.load(kind)[:4]]
    params = SamplingParams(max_new_tokens=40)
    want = [o.token_ids for o in engine.generate(ids, params, mode="ar")]
    outs = engine.generate(ids, params, **how)
    assert [o.token_ids for o in outs] == want
    return sum(o.stats.tokens - 1 for o in outs) / sum(o.stats.cycles for o in outs)


@pytest.mark.native
@pytest.mark.parametrize(
    ("kind", "draft_len", "fan_out"),
    [pytest.param("code", 7, 2, marks=UNLESS_SLOW), pytest.param("chat", 15, 6, marks=pytest.mark.full)],
)
def test_tokens_per_pass_are_pinned(kind, draft_len, fan_out):
    pinned, tolerance = of_this_isa(PINNED, 0.03, 0.3)
    rate = tokens_per_cycle(kind, mode="one_pass", draft_len=draft_len, fan_out=fan_out)
    assert rate == pytest.approx(pinned[kind, draft_len, fan_out], abs=tolerance)


@pytest.mark.native
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=UNLESS_SLOW) for mode in PINNED_DEFAULTS["avx512"]])
def test_tokens_per_cycle_of_a_cpus_defaults_are_pinned(mode):
    pinned, tolerance = of_this_isa(PINNED_DEFAULTS, 0.03, 0.3)
    assert tokens_per_cycle("code", mode=mode) == pytest.approx(pinned[mode], abs=tolerance)


def test_whoever_gets_a_slot_again_begins_without_drafts():
    """As at first: that its next cycle has none to verify says nothing about how well it drafts."""
    request = Request("name", [1, 2], SamplingParams(), [], 10)
    for _ in range(2):
        request.begin(0, 0)
        assert request.fresh
        request.record([3], None, 0, 0)
        request.record([4], CyclePlan("one_pass", 4, 2), 0, 0)
        assert not request.fresh
