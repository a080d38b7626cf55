"""Consensus against its definition, on random states: accept, stop, commit, stage."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as hs

from orthrus_rt import reference
from orthrus_rt import state as st
from orthrus_rt.plan import empty_rows

MASK = 99


def make_state(slots, block_len, capacity=7, stops=3):
    return st.SlotState.allocate(slots, block_len, capacity, stops, "cpu")


def spec_emitted(drafts, choices, n, limit, stops):
    """What a verification must emit, from the rule in words: AR decoding's own tokens, as far as drafts agreed."""
    emitted = []
    for i, token in enumerate(choices):
        if n + 1 + i >= limit:
            break
        emitted.append(token)
        if token in stops or i >= len(drafts) or drafts[i] != token:
            break
    return emitted


@settings(max_examples=300, deadline=None)
@given(hs.data())
def test_verify(data):
    k = data.draw(hs.integers(1, 5))
    slots = data.draw(hs.integers(1, 3))
    state = make_state(slots, k)
    rows = empty_rows(0, 0, slots, k, "cpu")
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
        mine = [data.draw(token) for _ in range(k)]
        state.cache_seqlens[s], state.limit[s], state.num_drafts[s] = n, limit, m
        state.num_output[s] = data.draw(hs.integers(0, 9))
        state.block_tokens[s, 1 : 1 + m] = torch.tensor(drafts, dtype=torch.int32)
        state.stop_ids[s, : len(stops)] = torch.tensor(stops, dtype=torch.int32)
        state.finish[s] = st.RUNNING if running else st.STOP
        before.append((n, limit, drafts, stops, running, int(state.num_output[s])))
        choices += mine
    ids = torch.tensor(choices, dtype=torch.int32)[:, None]
    reference.consensus(state, (None, ids), st.STEP_VERIFY, st.NEXT_DRAFT, rows, MASK, k)
    for s, (n, limit, drafts, stops, running, output) in enumerate(before):
        staged = rows.position[s * k : (s + 1) * k].tolist()
        if not running:
            assert int(state.cache_seqlens[s]) == n and staged == [-1] * k
            continue
        want = spec_emitted(drafts, choices[s * k : (s + 1) * k], n, limit, stops)
        capacity = state.output.shape[1]
        got = [int(state.output[s, (output + i) % capacity]) for i in range(len(want))]
        assert int(state.num_output[s]) == output + len(want) and got == want
        now = int(state.cache_seqlens[s])
        assert now == n + len(want) and now + 1 <= limit
        finish = int(state.finish[s])
        if want and want[-1] in stops:
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
    rows = empty_rows(1, 4, 0, 0, "cpu")
    ids = torch.tensor([[7], [8], [9]], dtype=torch.int32)
    reference.consensus(state, (None, ids), st.STEP_DRAFT, st.NEXT_VERIFY, rows, MASK, 4)
    assert int(state.num_drafts[0]) == 2  # position 13 is beyond the limit
    assert rows.token.tolist() == [5, 7, 8, 0]
    assert rows.position.tolist() == [10, 11, 12, -1]
    assert rows.prefix_len.tolist() == [11, 12, 13, 0]


def test_partial_maxima_ties_to_the_lowest_id():
    state = make_state(1, 1)
    state.cache_seqlens[0], state.limit[0], state.finish[0] = 3, 9, st.RUNNING
    value = torch.tensor([[1.0, 4.0, 4.0, 2.0]])
    ids = torch.tensor([[2, 11, 17, 30]], dtype=torch.int32)
    rows = empty_rows(1, 1, 0, 0, "cpu")
    reference.consensus(state, (value, ids), st.STEP_VERIFY, st.NEXT_AR, rows, MASK, 1)
    assert int(state.block_tokens[0, 0]) == 11
    assert rows.token.tolist() == [11] and rows.position.tolist() == [4] and rows.prefix_len.tolist() == [5]
