"""Consensus against its definition, on random states: accept, stop, commit, stage; its kernels against the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs

from orthrus_rt import dispatch, native, reference
from orthrus_rt import state as st
from orthrus_rt.cycle_plan import MAX_BLOCK_LEN
from orthrus_rt.rows import Layout, empty_rows
from tests import consensus_states as cs
from tests.consensus_states import MASK


def make_state(slots, block_len):
    return st.SlotState.allocate(slots, block_len, 7, 3, "cpu")


def spec_emitted(drafts, choices, n, limit, stops):
    """What a verification must emit, from the rule in words: AR decoding's own tokens, as far as drafts agreed; and
    whether it reached a row without a choice (None).
    """
    emitted = []
    for i, token in enumerate(choices):
        if n + 1 + i >= limit:
            break
        if token is None:
            return emitted, True
        emitted.append(token)
        if token in stops or i >= len(drafts) or drafts[i] != token:
            break
    return emitted, False


@settings(max_examples=300, deadline=None)
@given(hs.data())
def test_verify(data):
    k = data.draw(hs.integers(1, 5))
    slots = data.draw(hs.integers(1, 3))
    state = make_state(slots, k)
    rows = empty_rows(Layout(0, 0, slots, k), "cpu")
    token = hs.integers(0, 3)
    before = []
    choices = []
    for s in range(slots):
        n = data.draw(hs.integers(0, 6))
        limit = n + 1 + data.draw(hs.integers(1, 6))
        m = min(data.draw(hs.integers(0, k - 1)), limit - 1 - n)
        drafts = [data.draw(token) for _ in range(m)]
        stops = data.draw(hs.lists(hs.integers(2, 3), max_size=2))
        running = data.draw(hs.booleans())
        mine = [data.draw(hs.none() | token) for _ in range(k)]
        state.cache_seqlens[s], state.limit[s], state.num_drafts[s] = n, limit, m
        state.num_output[s] = data.draw(hs.integers(0, 9))
        state.block_tokens[s, 1 : 1 + m] = torch.tensor(drafts, dtype=torch.int32)
        state.stop_ids[s, : len(stops)] = torch.tensor(stops, dtype=torch.int32)
        state.finish[s] = st.RUNNING if running else st.STOP
        before.append((n, limit, drafts, stops, running, int(state.num_output[s])))
        choices += mine
    # The id of a row without a choice would be the right one, or a stop id, if it counted.
    ids = torch.tensor([data.draw(token) if c is None else c for c in choices], dtype=torch.int32)[:, None]
    nothing = data.draw(hs.sampled_from([-torch.inf, torch.nan]))
    value = torch.tensor([nothing if c is None else -5.0 for c in choices])[:, None]
    reference.consensus(state, (value, ids), st.STEP_VERIFY, st.NEXT_DRAFT, rows, MASK, k)
    for s, (n, limit, drafts, stops, running, output) in enumerate(before):
        staged = rows.position[s * k : (s + 1) * k].tolist()
        if not running:
            assert int(state.cache_seqlens[s]) == n and staged == [-1] * k
            continue
        want, no_choice = spec_emitted(drafts, choices[s * k : (s + 1) * k], n, limit, stops)
        capacity = state.output.shape[1]
        got = [int(state.output[s, (output + i) % capacity]) for i in range(len(want))]
        assert int(state.num_output[s]) == output + len(want) and got == want
        now = int(state.cache_seqlens[s])
        assert now == n + len(want) and now + 1 <= limit
        finish = int(state.finish[s])
        if no_choice:
            assert finish == st.NO_CHOICE and int(state.num_accepted[s]) == len(want)
        elif want and want[-1] in stops:
            assert finish == st.STOP
        elif now + 1 == limit:
            assert finish == st.LENGTH
        else:
            assert finish == st.RUNNING
        assert int(state.num_accepted[s]) <= len(drafts)
        if finish == st.RUNNING:
            assert int(state.block_tokens[s, 0]) == want[-1]
            assert int(state.num_accepted[s]) == len(want) - 1
            want_positions = [now + i if now + i < limit else -1 for i in range(k)]
            assert staged == want_positions
            tokens = rows.token[s * k : (s + 1) * k].tolist()
            assert tokens[0] == want[-1]
            assert all(t == (MASK if p >= 0 else 0) for t, p in zip(tokens[1:], staged[1:], strict=True))
            assert rows.prefix_len[s * k : (s + 1) * k].tolist() == [now if p >= 0 else 0 for p in staged]
        else:
            assert staged == [-1] * k


def test_draft_then_verify_rows():
    state = make_state(1, 4)
    state.cache_seqlens[0], state.limit[0], state.finish[0] = 10, 13, st.RUNNING
    state.block_tokens[0, 0] = 5
    rows = empty_rows(Layout(1, 4), "cpu")
    ids = torch.tensor([[7], [8], [9]], dtype=torch.int32)
    reference.consensus(state, (torch.zeros(3, 1), ids), st.STEP_DRAFT, st.NEXT_VERIFY, rows, MASK, 4)
    assert int(state.num_drafts[0]) == 2  # position 13 is beyond the limit
    assert rows.token.tolist() == [5, 7, 8, 0]
    assert rows.position.tolist() == [10, 11, 12, -1]
    assert rows.prefix_len.tolist() == [11, 12, 13, 0]


def test_partial_maxima_ties_to_the_lowest_id():
    state = make_state(1, 1)
    state.cache_seqlens[0], state.limit[0], state.finish[0] = 3, 9, st.RUNNING
    value = torch.tensor([[1.0, 4.0, 4.0, 2.0]])
    ids = torch.tensor([[2, 11, 17, 30]], dtype=torch.int32)
    rows = empty_rows(Layout(1, 1), "cpu")
    reference.consensus(state, (value, ids), st.STEP_VERIFY, st.NEXT_AR, rows, MASK, 1)
    assert int(state.block_tokens[0, 0]) == 11
    assert rows.token.tolist() == [11] and rows.position.tolist() == [4] and rows.prefix_len.tolist() == [5]


KERNELS = ("cpu", "cuda", "cuda-descending")


@pytest.fixture(params=("reference", *KERNELS))
def consensus(request):
    """Every implementation; CUDA's runs on the host, in both thread orders."""
    if request.param == "reference":
        return reference.consensus
    if request.param == "cpu" and dispatch.extension() is None:
        pytest.skip("the native module is not built")
    if request.param != "cpu":
        request.getfixturevalue("host").descending = request.param == "cuda-descending"
    return native.consensus


@pytest.mark.parametrize("consensus", KERNELS, indirect=True)
@pytest.mark.parametrize("block_len", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("num_partials", [1, 2, 132])
def test_kernels_equal_the_oracle(consensus, block_len, num_partials):
    for seed, case in enumerate(cs.steps(block_len) * 2):
        cs.check(consensus, seed, case, 6, block_len, num_partials)


@pytest.mark.parametrize("consensus", KERNELS, indirect=True)
@pytest.mark.parametrize("block_len", [2, 3, 5, 16, 40])
@pytest.mark.parametrize("fan_out", [1, 4, 8, 11])
def test_kernels_equal_the_oracle_in_one_pass(consensus, block_len, fan_out):
    for seed, case in enumerate(cs.one_pass_steps(block_len, fan_out) * 4):
        cs.check(consensus, seed, case, 6, block_len, (1, 2, 37, 1187)[seed % 4], fan_out)


@pytest.mark.parametrize("consensus", KERNELS, indirect=True)
def test_kernels_equal_the_oracle_on_the_longest_block(consensus):
    for seed, case in enumerate(cs.one_pass_steps(MAX_BLOCK_LEN, 1)):
        cs.check(consensus, seed, case, 2, MAX_BLOCK_LEN, 2, 1)


@pytest.mark.parametrize("nothing", [-torch.inf, torch.nan])
@pytest.mark.parametrize(("step", "fan_out"), [(st.STEP_VERIFY, 0), (st.STEP_VERIFY_AND_DRAFT, 1)])
def test_a_row_without_a_choice(consensus, nothing, step, fan_out):
    """Slots that reach such a row end there, with the tokens before it; those that do not reach one go on."""
    drafts, k = [11, 12, 13], 4
    cases = {  # where the choices differ from the drafts, rows without one, limit, stop id -> emitted, finish
        "first": (9, [0], 90, -1, [], st.NO_CHOICE),
        "behind accepted drafts": (9, [2], 90, -1, [11, 12], st.NO_CHOICE),
        "the bonus": (9, [3], 90, -1, [11, 12, 13], st.NO_CHOICE),
        "all": (9, [0, 1, 2, 3], 90, -1, [], st.NO_CHOICE),
        "behind a rejected draft": (1, [2, 3], 90, -1, [11, 0], st.RUNNING),
        "behind a stop id": (9, [1], 90, 11, [11], st.STOP),
        "behind the limit": (9, [2], 53, -1, [11, 12], st.LENGTH),
        "at the limit": (9, [2], 54, -1, [11, 12], st.NO_CHOICE),
        "whose id is a stop id": (9, [1], 90, 12, [11], st.NO_CHOICE),
    }
    slots, per_slot = len(cases), k * (1 + fan_out)
    state = st.SlotState.allocate(slots, k, 8, 1, "cpu", max_fan_out=1)
    ids = torch.zeros(slots, per_slot, 3, dtype=torch.int32)
    value = torch.full((slots, per_slot, 3), nothing)
    value[:, k:] = torch.tensor([1.0, nothing, 2.0])  # of the block that assumes all drafts to be accepted
    for s, (differs, none, limit, stop, _, _) in enumerate(cases.values()):
        state.cache_seqlens[s], state.limit[s], state.stop_ids[s], state.finish[s] = 50, limit, stop, st.RUNNING
        state.block_tokens[s] = torch.tensor([10, *drafts])
        state.num_drafts[s] = min(3, limit - 51)
        ids[s, :k, :] = torch.tensor([*drafts, 14], dtype=torch.int32)[:, None] + torch.tensor([0, 0, 40])
        ids[s, differs:k] = 0
        for i in set(range(k)) - set(none):
            value[s, i, 1] = -3e38  # is a number
    state.hypotheses[:] = torch.tensor([3, -1])
    rows = empty_rows(Layout(slots, k, slots * fan_out, k), "cpu")
    partials = value.flatten(0, 1).contiguous(), ids.flatten(0, 1).contiguous()
    next_pass = st.NEXT_ONE_PASS if fan_out else st.NEXT_VERIFY
    consensus(state, partials, step, next_pass, rows, MASK, k, fan_out)
    for s, (what, (_, _, _, _, emitted, finish)) in enumerate(cases.items()):
        assert int(state.finish[s]) == finish, what
        assert state.output[s, : int(state.num_output[s])].tolist() == emitted, what
        assert int(state.cache_seqlens[s]) == 50 + len(emitted) == 50 + int(state.num_output[s]), what
        assert int(state.num_accepted[s]) == sum(a == b for a, b in zip(emitted, drafts, strict=False)), what
        ended = finish != st.RUNNING
        assert (rows.position[s * k] == -1) == ended, what
        block = rows.position[(slots + s) * k :][:k] if fan_out else torch.tensor([-1 if ended else 0])
        assert (block == -1).all() == ended, what


@pytest.mark.parametrize("nothing", [-torch.inf, torch.nan])
def test_draft_rows_without_a_choice_are_drafts_all_the_same(consensus, nothing):
    """A draft pass whose logits are NaN, and a block of a one-pass cycle: the first id, with a probability of 0."""
    k, ids = 4, torch.arange(5, 8, dtype=torch.int32)
    state = st.SlotState.allocate(1, k, 8, 1, "cpu", max_fan_out=1)
    state.cache_seqlens[0], state.limit[0], state.finish[0] = 10, 40, st.RUNNING
    rows = empty_rows(Layout(1, k), "cpu")
    partials = torch.full((k - 1, 3), nothing), ids.repeat(k - 1, 1)
    consensus(state, partials, st.STEP_DRAFT, st.NEXT_VERIFY, rows, MASK, k, 0)
    assert int(state.finish[0]) == st.RUNNING and rows.token.tolist() == [0, 5, 5, 5]
    state.num_drafts[0] = 0
    state.hypotheses[0, 0] = torch.tensor([0, -1])
    value = torch.full((2 * k, 3), nothing)
    value[0, 1] = 1.0
    rows = empty_rows(Layout(1, k, 1, k), "cpu")
    consensus(state, (value, ids.repeat(2 * k, 1)), st.STEP_VERIFY_AND_DRAFT, st.NEXT_ONE_PASS, rows, MASK, k, 1)
    assert int(state.finish[0]) == st.RUNNING and state.output[0, 0] == 6
    assert rows.token[:k].tolist() == [6, 5, 5, 5] and not state.draft_prob[0, 1:k].any()


def test_candidates_that_tie_or_overflow(consensus):
    """The lower id comes first; where the largest is infinite, all have probability 0."""
    k, inf = 4, torch.inf
    state = st.SlotState.allocate(1, k, 8, 1, "cpu", max_fan_out=1)
    state.cache_seqlens[0], state.limit[0], state.finish[0] = 10, 40, st.RUNNING
    state.hypotheses[0, 0] = torch.tensor([0, -1])
    value = torch.zeros(2 * k, 5)
    value[[0, k], 1] = 1.0
    value[k + 1 :] = torch.tensor([[1, 4, 4, 4, 2], [2, 3, 2, 2, -inf], [1, inf, 3, inf, torch.nan]])
    ids = torch.arange(5, 10, dtype=torch.int32).repeat(2 * k, 1)
    consensus(state, (value, ids), st.STEP_VERIFY_AND_DRAFT, st.NEXT_NONE, None, MASK, k, 1)
    assert state.block_tokens[0].tolist() == [6, 6, 6, 6]
    assert state.runner_up[0, 1:].tolist() == [[7, 8], [5, 7], [8, 7]]
    assert state.draft_prob[0, 1, 0] == state.draft_prob[0, 1, 2] > 0 and not state.draft_prob[0, 3].any()


def test_a_shorter_block_stages_fewer_drafts(consensus):
    state = st.SlotState.allocate(1, 6, 8, 1, "cpu")
    state.cache_seqlens[0], state.limit[0], state.finish[0], state.num_drafts[0] = 10, 40, st.RUNNING, 5
    state.block_tokens[0] = torch.arange(20, 26)
    rows = empty_rows(Layout(1, 3), "cpu")
    consensus(state, (None, None), st.STEP_STAGE, st.NEXT_VERIFY, rows, MASK, 3, 0)
    assert int(state.num_drafts[0]) == 2 and rows.token.tolist() == [20, 21, 22]
