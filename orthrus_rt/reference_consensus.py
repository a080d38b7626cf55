"""The oracle of consensus, slot by slot in plain Python; a part of :mod:`orthrus_rt.reference`.

The hypotheses of one-pass cycles are explained in csrc/include/orthrus/hypotheses.h.
"""

from __future__ import annotations

import torch

from orthrus_rt import state as st
from orthrus_rt.rows import Rows

SEEN_GAIN = 1.6
DOUBT = 0.5


def first_argmax(x):
    """Index of the maximum of each row, the lowest on ties."""
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1]).amin(-1)


def consensus(
    state: st.SlotState, partials, step, next_pass, rows_next: Rows | None, mask_token_id, block_len, fan_out=0
):
    """Accept, stop, commit and stage, slot by slot; see :func:`orthrus_rt.ops.consensus` for the contract."""
    choices, is_none = ([], []) if step == st.STEP_STAGE else _choices(*partials)
    per_slot = len(choices) // state.num_slots if state.num_slots else 0
    for s in range(state.num_slots):
        first = s * per_slot
        if int(state.finish[s]) == st.RUNNING:
            mine, none = (x[first : first + per_slot] for x in (choices, is_none))
            if step == st.STEP_DRAFT:
                _take_drafts(state, s, mine)
            elif step == st.STEP_VERIFY:
                _accept(state, s, mine, none)
            elif step == st.STEP_VERIFY_AND_DRAFT:
                drafts, runner_up, prob = _drafts(state, s)
                _accept(state, s, mine[:block_len], none[:block_len])
                if int(state.finish[s]) == st.RUNNING:
                    renewed = _renew(state, s, partials, first, block_len, fan_out, mine, (drafts, runner_up, prob))
                    _set_drafts(state, s, *renewed)
        if next_pass != st.NEXT_NONE:
            if step == st.STEP_STAGE:
                most = block_len - 1 if next_pass in (st.NEXT_VERIFY, st.NEXT_ONE_PASS) else 0
                state.num_drafts[s] = min(int(state.num_drafts[s]), most)
            _stage(state, s, next_pass, rows_next, mask_token_id, block_len)
            if next_pass == st.NEXT_ONE_PASS:
                _stage_blocks(state, s, rows_next, mask_token_id, block_len, fan_out)


def _choices(value, index):
    """Every row's choice, and whether it has none, in which case the id is just that of its first partial."""
    value = torch.where(value.isnan(), -torch.inf, value)
    ids = index.gather(1, first_argmax(value)[:, None])[:, 0]
    return ids.tolist(), value.amax(1).isneginf().tolist()


def _take_drafts(state, s, choices):
    room = int(state.limit[s]) - 1 - int(state.cache_seqlens[s])
    drafts = choices[: max(0, min(len(choices), room))]
    state.num_drafts[s] = len(drafts)
    for i, token in enumerate(drafts):
        state.block_tokens[s, 1 + i] = token


def _accept(state, s, choices, is_none):
    drafts = state.block_tokens[s, 1 : 1 + int(state.num_drafts[s])].tolist()
    accepted = 0
    while accepted < min(len(drafts), len(choices)) and not is_none[accepted] and drafts[accepted] == choices[accepted]:
        accepted += 1
    n = int(state.cache_seqlens[s])
    emitted = choices[: min(accepted + 1, int(state.limit[s]) - 1 - n)]
    finish = st.LENGTH if n + 1 + len(emitted) >= int(state.limit[s]) else st.RUNNING
    stop_ids = set(state.stop_ids[s].tolist()) - {-1}
    for i, token in enumerate(emitted):
        if is_none[i]:
            emitted, finish = emitted[:i], st.NO_CHOICE
            break
        if token in stop_ids:
            emitted, finish = emitted[: i + 1], st.STOP
            break
    for token in emitted:
        state.output[s, int(state.num_output[s]) % state.output.shape[1]] = token
        state.num_output[s] += 1
    if emitted:
        state.block_tokens[s, 0] = emitted[-1]
    state.cache_seqlens[s] = n + len(emitted)
    state.num_verified[s] = len(drafts)
    state.num_accepted[s] = min(accepted, len(emitted))
    state.num_drafts[s] = 0
    state.finish[s] = finish


def _drafts(state, s):
    """``(tokens [m], runner_up [m, 2], prob [m, 3])`` of the slot's drafts, copied."""
    m = int(state.num_drafts[s])
    return tuple(x[s, 1 : 1 + m].clone() for x in (state.block_tokens, state.runner_up, state.draft_prob))


def _set_drafts(state, s, tokens, runner_up, prob):
    m = len(tokens)
    state.num_drafts[s] = m
    state.block_tokens[s, 1 : 1 + m], state.runner_up[s, 1 : 1 + m], state.draft_prob[s, 1 : 1 + m] = (
        tokens, runner_up, prob,
    )  # fmt: skip


def _renew(state, s, partials, first, block_len, fan_out, choices, old):
    """The next drafts: from the block whose hypothesis came true, else those after the rejected draft."""
    accepted, bonus = int(state.num_accepted[s]), int(state.block_tokens[s, 0])
    suppositions = [tuple(h) for h in state.hypotheses[s, :fan_out].tolist()]
    if (accepted, bonus) in suppositions:
        block, begin = suppositions.index((accepted, bonus)), 0
    elif (accepted, -1) in suppositions:
        block, begin = suppositions.index((accepted, -1)), 1
    else:
        tokens, runner_up, prob = (x[accepted + 1 :] for x in old)
        prob[:, 0] *= DOUBT
        return tokens, runner_up, prob
    row = block_len * (1 + block)
    count = min(block_len - 1, int(state.limit[s]) - 1 - int(state.cache_seqlens[s]))
    value, index = (x[first + row + begin :][:count] for x in partials)
    ids, prob = candidates(value, index)
    if begin == 1 and choices[row] != bonus:
        prob[:, 0] *= DOUBT
    return ids[:, 0], ids[:, 1:], prob


def candidates(value, index):
    """``(ids [n, 3], probs fp32 [n, 3])``: each row's largest partial maxima and their softmax over all of them."""
    value = torch.where(value.isnan(), -torch.inf, value)
    best = value.sort(dim=-1, descending=True, stable=True)
    top, order = best.values[:, : st.CANDIDATES], best.indices[:, : st.CANDIDATES]
    missing = st.CANDIDATES - top.shape[1]
    top = torch.nn.functional.pad(top, (0, missing), value=-torch.inf)
    ids = torch.where(top > -torch.inf, index.gather(1, torch.nn.functional.pad(order, (0, missing))), index[:, :1])
    prob = torch.exp(top - top[:, :1]) / torch.exp(value - top[:, :1]).sum(-1, keepdim=True)
    return ids, torch.where(top[:, :1].isfinite(), prob, 0)


def pick_hypotheses(drafts, runner_up, prob, fan_out):
    """``[(accepted, anchor)]`` of ``fan_out`` blocks by expected gain; (-1, -1) if no more are possible."""
    reach = [1.0, *prob[:, 0].cumprod(0).tolist()]
    m = len(drafts)
    picked = []

    def gain(j, rank):
        if rank:
            return reach[j] * float(prob[j, rank]) * (SEEN_GAIN - 1 if (j, 0) in picked else SEEN_GAIN)
        seen = sum(float(prob[j, r]) for r in (1, 2) if (j, r) in picked)
        return reach[j] * max(0.0, 1.0 if j == m else 1 - float(prob[j, 0]) - seen)

    possible = [(j, rank) for j in range(m + 1) for rank in range(st.CANDIDATES) if j < m or rank == 0]
    for _ in range(min(fan_out, len(possible))):
        picked.append(max((c for c in possible if c not in picked), key=lambda c: gain(*c)))
    chosen = [(j, int(runner_up[j, rank - 1]) if rank else -1) for j, rank in picked]
    return chosen + [(-1, -1)] * (fan_out - len(chosen))


def _stage(state, s, next_pass, rows: Rows, mask_token_id, block_len):
    running = int(state.finish[s]) == st.RUNNING
    n, limit = int(state.cache_seqlens[s]), int(state.limit[s])
    count = 1 if next_pass == st.NEXT_AR else block_len
    for i in range(count):
        r = s * count + i
        valid = running and n + i < limit
        token = int(state.block_tokens[s, i])
        if next_pass in (st.NEXT_VERIFY, st.NEXT_ONE_PASS):
            valid = valid and i <= int(state.num_drafts[s])
        elif next_pass == st.NEXT_DRAFT and i > 0:
            token = mask_token_id
        prefix_len = n if next_pass == st.NEXT_DRAFT else n + i + 1
        _stage_row(rows, r, s, valid, token, n + i, prefix_len)


def _stage_row(rows, r, s, valid, token, position, prefix_len):
    rows.token[r] = token if valid else 0
    rows.position[r] = position if valid else -1
    rows.seq[r] = s
    rows.prefix_len[r] = prefix_len if valid else 0


def _stage_blocks(state, s, rows: Rows, mask_token_id, block_len, fan_out):
    running = int(state.finish[s]) == st.RUNNING
    n, limit = int(state.cache_seqlens[s]), int(state.limit[s])
    if running:
        chosen = pick_hypotheses(*_drafts(state, s), fan_out)
        state.hypotheses[s, :fan_out] = torch.tensor(chosen, dtype=torch.int32, device=state.hypotheses.device).view(
            -1, 2
        )
    for f in range(fan_out):
        accepted, anchor = state.hypotheses[s, f].tolist()
        start = n + accepted + (anchor >= 0)
        first = anchor if anchor >= 0 else int(state.block_tokens[s, max(accepted, 0)])
        for i in range(block_len):
            r = (state.num_slots + s * fan_out + f) * block_len + i
            valid = running and accepted >= 0 and start + i < limit
            _stage_row(rows, r, s, valid, mask_token_id if i else first, start + i, start)
