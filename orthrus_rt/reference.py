"""The oracle: every op in plain torch, obvious and slow. Runs on any device and float dtype.

Each op takes what its counterpart in :mod:`orthrus_rt.ops` takes, but for what only says how to run (workspaces, hints,
``max_seq_len``) and for ``exact``, and ``row_linear`` takes plain matrices. The rounding points are the same:
arithmetic in fp32, one rounding to the output's dtype. It is also a backend (``ORTHRUS_BACKEND=reference``), the only
one for float16 models. It is *not* row-invariant: torch's own reductions may change with the shape.
"""

from __future__ import annotations

import torch

from orthrus_rt import state as st
from orthrus_rt.filters import filtered, total_mass
from orthrus_rt.reference_consensus import consensus, first_argmax  # noqa: F401 (consensus is one of the ops)
from orthrus_rt.rows import Rows


def embed(token, table, out):
    """out[r] = table[token[r]]."""
    out.copy_(table[token.long()])


def rms_norm(x, weight, eps, out, row_index=None):
    """out = round(x * rsqrt(mean(x^2) + eps) * weight), with rows picked by ``row_index`` if given."""
    if row_index is not None:
        x = x[row_index.long()]
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(y * weight.float())


def row_linear(x, weight, out, *, weight_diff=None, num_rows_ar=None, residual=None, epilogue="none"):
    """y[r] = x[r] @ W(r)^T with fp32 accumulation, then the epilogue. ``weight`` is ``[out_features, in_features]``."""
    if weight_diff is None:
        acc = x.float() @ weight.float().T
    else:
        acc = torch.cat([x[:num_rows_ar].float() @ weight.float().T, x[num_rows_ar:].float() @ weight_diff.float().T])
    if epilogue == "residual":
        acc = acc + residual.float()
    elif epilogue == "silu_mul":
        gate, up = acc.chunk(2, dim=-1)
        acc = gate / (1 + torch.exp(-gate)) * up
    if epilogue == "argmax":
        _partials(acc, -(-acc.shape[1] // out[0].shape[1]), out)
    else:
        out.copy_(acc)


def _partials(x, tile, out):
    """The maximum over every ``tile`` ids of ``x`` ``[num_rows, vocab_size]`` and its lowest id; NaN never wins."""
    value, index = out
    n, tiles = value.shape
    padded = torch.full((n, tiles * tile), -torch.inf, dtype=x.dtype, device=x.device)
    padded[:, : x.shape[1]] = torch.where(x.isnan(), -torch.inf, x)
    padded = padded.view(n, tiles, tile)
    value.copy_(padded.amax(-1))
    index.copy_(first_argmax(padded) + torch.arange(tiles, device=x.device) * tile)


def rope(x, position, cos_sin):
    """Half-split rotary embedding of ``x`` fp32 ``[rows, heads, head_dim]`` at int ``position`` ``[rows]``."""
    half = x.shape[-1] // 2
    table = cos_sin[position.clamp(min=0).long()]
    cos, sin = table[:, None, :half], table[:, None, half:]
    lo, hi = x[..., :half], x[..., half:]
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1)


def qkv_commit(qkv, rows: Rows, cos_sin, norms, eps, k_pages, v_pages, page_table, scratch_k, scratch_v, q_out):
    """QK RMSNorm and RoPE in fp32, with one rounding. AR keys/values go to their pages, diffusion ones to the scratch.
    A non-finite value becomes 0 and the key's element in its place NaN, so that :func:`dual_attn` has no 0 * NaN for
    other rows.

    ``norms`` is None or ``(q_norm, k_norm, q_norm_diff, k_norm_diff)``, each ``[head_dim]``.
    """
    num_heads_q, head_dim = q_out.shape[1:]
    num_heads_kv = k_pages.shape[1]
    split = [num_heads_q, num_heads_kv, num_heads_kv]
    q, k, v = qkv.view(rows.num_rows, -1, head_dim).float().split(split, dim=1)
    if norms is not None:
        q_norm, k_norm, q_norm_diff, k_norm_diff = norms
        ar = (torch.arange(rows.num_rows, device=qkv.device) < rows.num_rows_ar)[:, None, None]
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + eps) * torch.where(ar, q_norm, q_norm_diff).float()
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + eps) * torch.where(ar, k_norm, k_norm_diff).float()
    q_out.copy_(rope(q, rows.position, cos_sin))
    k = rope(k, rows.position, cos_sin).to(k_pages.dtype)
    v = v.to(v_pages.dtype)
    k, v = torch.where(v.isfinite(), k, torch.nan), torch.where(v.isfinite(), v, 0)
    n = rows.num_rows_ar
    page_size = k_pages.shape[2]
    position = rows.position[:n].long()
    page = page_table[rows.seq[:n].long(), position.clamp(min=0) // page_size].long()
    page = torch.where(position >= 0, page, 0)
    slot = position.clamp(min=0) % page_size
    k_pages[page, :, slot] = k[:n]
    v_pages[page, :, slot] = v[:n]
    if rows.num_rows_diff:
        scratch_k.copy_(k[n:])
        scratch_v.copy_(v[n:])


def dual_attn(q, k_pages, v_pages, page_table, scratch_k, scratch_v, rows: Rows, softmax_scale, out):
    """Softmax attention, group by group, over ``kv < prefix_len[row] or same block``. Rows that see nothing get 0."""
    page_size = k_pages.shape[2]
    heads_per_kv = q.shape[1] // k_pages.shape[1]
    starts = rows.group_start.tolist()
    prefix_len = rows.prefix_len.tolist()
    seqs = rows.seq.tolist()
    for g in range(rows.num_groups):
        a, b = starts[g], starts[g + 1]
        if a == b:
            continue
        longest = max(prefix_len[a:b])
        pages = page_table[seqs[a], : -(-longest // page_size)].long()
        k = k_pages[pages].transpose(1, 2).flatten(0, 1)[:longest].float()  # [kv, heads_kv, head_dim]
        v = v_pages[pages].transpose(1, 2).flatten(0, 1)[:longest].float()
        position = torch.arange(longest, device=q.device)
        visible = position[None, :] < rows.prefix_len[a:b, None]
        if g >= rows.num_groups_ar:
            lo, hi = a - rows.num_rows_ar, b - rows.num_rows_ar
            k = torch.cat([k, scratch_k[lo:hi].float()])
            v = torch.cat([v, scratch_v[lo:hi].float()])
            own = (rows.position[a:b] >= 0)[None, :] & (rows.position[a:b] >= 0)[:, None]
            visible = torch.cat([visible, own], dim=1)
        seen_by_any = visible.any(0)
        k = torch.where(seen_by_any[:, None, None], k, 0)  # unused cache may hold anything, including NaN
        v = torch.where(seen_by_any[:, None, None], v, 0)
        k = k.repeat_interleave(heads_per_kv, dim=1)
        v = v.repeat_interleave(heads_per_kv, dim=1)
        scores = torch.einsum("rhd,khd->hrk", q[a:b].float(), k) * softmax_scale
        scores = scores.masked_fill(~visible, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min) if k.shape[0] else 0.0
        weights = torch.exp(scores - top)
        total = weights.sum(-1)  # [heads, rows]
        mixed = torch.einsum("hrk,khd->rhd", weights, v)
        out[a:b] = torch.where(total.T[..., None] == 0, 0, mixed / total.T[..., None].clamp(min=1e-30)).to(out.dtype)


# --- process_logits ---------------------------------------------------------------------------------


def philox(seed, position, purpose, token):
    """Philox 4x32-10 as int64 tensors in [0, 2**32): word ``token % 4`` of counter (token // 4, position, purpose, 0).

    The key is (low, high) half of ``seed``. Arguments are ints or int tensors that broadcast.
    """
    device = next((x.device for x in (token, position, seed, purpose) if isinstance(x, torch.Tensor)), "cpu")
    token, position, seed, purpose = (
        torch.as_tensor(x, dtype=torch.int64, device=device) for x in (token, position, seed, purpose)
    )
    low = 0xFFFFFFFF
    c = [token >> 2, position & low, purpose, torch.zeros_like(token)]
    key = [seed & low, (seed >> 32) & low]

    def product(m, x):  # high and low word of m * x without leaving int64
        return (m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16, (m * x) & low

    for _ in range(10):
        hi0, lo0 = product(0xD2511F53, c[0])
        hi1, lo1 = product(0xCD9E8D57, c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    lane = token & 3
    return torch.where(lane < 2, torch.where(lane == 0, c[0], c[1]), torch.where(lane == 2, c[2], c[3]))


def uniforms(seed, position, purpose, token):
    """fp32 in (0, 1), one per token, with the same bits everywhere: min((fp32(word) + 0.5) * 2**-32, 1 - 2**-24)."""
    return ((philox(seed, position, purpose, token).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def exponential(seed, position, purpose, token):
    """-log(1 - u), fp32, with full relative precision near 0, which decides samples.

    ``argmax(y - log(exponential))`` draws from softmax(y), as its -log is Gumbel noise. Logarithms differ in the last
    bits between implementations; the uniforms do not.
    """
    u = uniforms(seed, position, purpose, token)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    return torch.where(u < 2.0**-7, series, -torch.log(1 - u))


def process_logits(
    logits, rows: Rows, logit_rows, sampling: st.SlotSampling, cache_seqlens, purpose, partials, *, log_probs=None
):
    """Apply edits, then compute the scores of a Gumbel draw from :func:`orthrus_rt.filters.filtered_probabilities`; in
    greedy rows every logit is a score.

    See :func:`orthrus_rt.ops.process_logits` for the contract.
    """
    r = logit_rows.long()
    slot, position = rows.seq[r].long(), rows.position[r] + 1
    y = torch.where(logits.isnan(), -torch.inf, logits)
    if sampling.edits is not None:
        y = _edit(y, rows, r, slot, position, sampling.edits, cache_seqlens)
    temperature, top_k, top_p, min_p, seed = (t[slot] for t in (*sampling.filters(), sampling.seed))
    y, weight, keep = filtered(y, temperature, top_k, top_p, min_p)
    # Noise is expensive: draw it only for kept tokens that could still beat the likeliest one. It is at most 22.9.
    top, best = y.max(-1)
    lead = (top - torch.log(exponential(seed, position, purpose, best)))[:, None]
    greedy = (temperature <= 0)[:, None]
    row, token = (keep & (y >= lead - 23) & ~greedy).nonzero(as_tuple=True)
    noise = exponential(seed[row], position[row], purpose, token)
    score = torch.where(greedy, y, -torch.inf)
    score[row, token] = y[row, token] - torch.log(noise)
    score[position == 0] = 0
    _partials(score, st.SCORE_TILE, partials)
    if log_probs is not None:
        alone = keep.sum(-1, keepdim=True) == 1
        total = total_mass(torch.where(keep, weight, 0))
        value = torch.where(alone, 0, y - y.amax(-1, keepdim=True) - torch.log(total))
        log_probs.copy_(torch.where(keep, value, -torch.inf))


def _edit(y, rows: Rows, r, slot, position, edits: st.SlotEdits, cache_seqlens):
    """Apply penalties, bias and stop mask. An AR row also counts the uncommitted drafts up to its own."""
    counts = edits.token_counts[slot]
    drafts = torch.where(r < rows.num_rows_ar, position - 1 - cache_seqlens[slot], 0)
    for i, (row, count) in enumerate(zip(r.tolist(), drafts.tolist(), strict=True)):
        for token in rows.token[row + 1 - count : row + 1].tolist() if count > 0 else ():
            _count(counts[i], token)
    repetition, presence, frequency = edits.penalties[slot].unsqueeze(-1).unbind(1)
    punished = torch.where(y > 0, y / repetition, y * repetition)
    y = torch.where(counts != 0, punished, y)
    y = torch.where(counts > 0, y - (presence + frequency * counts), y)
    ids, values, last = edits.bias_ids[slot].long(), edits.bias_values[slot], y.shape[1] - 1
    values = torch.where((ids >= 0) & (ids <= last), values, 0)
    for i in range(ids.shape[1]):
        y = y + torch.zeros_like(y).scatter_(1, ids[:, i, None].clamp(0, last), values[:, i, None])
    stop = edits.stop_ids[slot].long()
    early = (position < edits.min_position[slot])[:, None] & (stop >= 0) & (stop <= last)
    banned = torch.zeros_like(y).scatter_add_(1, stop.clamp(0, last), early.float())
    return torch.where(banned > 0, -torch.inf, y)


def _count(counts, token):
    if 0 <= token < len(counts):
        counts[token] = max(int(counts[token]), 0) + 1


def count_tokens(state: st.SlotState, edits: st.SlotEdits):
    """Count what the output ring received since the last call; see :func:`orthrus_rt.ops.count_tokens`."""
    for s in range(state.num_slots):
        total, ring = int(state.num_output[s]), state.output.shape[1]
        for i in range(max(int(edits.num_counted[s]), total - ring), total):
            token = int(state.output[s, i % ring])
            _count(edits.token_counts[s], token)
        edits.num_counted[s] = total
