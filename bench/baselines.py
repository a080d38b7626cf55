"""Two ways to decode a dual-view model with torch alone, as baselines, written from the method's description.

* :class:`GrowingCache`: eager, one sequence, as transformers-style code does it. The cache is concatenated at every
  layer of every pass and cut back after every cycle, and acceptance is read back to the host.
* :class:`StaticCache`: the best that a user would get from torch without ``torch.compile``: fused weights, a
  preallocated cache written in place, SDPA with a mask, and the whole cycle as one CUDA graph (eager on the CPU), any
  number of sequences. On a GPU, SDPA's kernel for masks does not spread one sequence's keys over many SMs, as the
  kernel without masks may, so at long contexts the growing cache may be faster.

Both are greedy and give the tokens of AR decoding up to rounding.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from bench.common import graphed
from orthrus_rt.checkpoint import Checkpoint
from orthrus_rt.rope import cos_sin_table


class Weights:
    """A checkpoint as plain matrices on one device. ``fused`` joins q, k, v and gate, up into one matrix each."""

    def __init__(self, checkpoint: Checkpoint, device, dtype: torch.dtype, max_positions: int, *, fused: bool):
        self.config, self.device, self.dtype = checkpoint.config, torch.device(device), dtype
        tensors = checkpoint.tensors

        def get(*names):
            parts = [tensors[f"{name}.weight"].to(device=self.device, dtype=dtype) for name in names]
            return [torch.cat(parts)] if fused and len(parts) > 1 else parts

        self.embedding = get("model.embed_tokens")[0]
        tied = self.config.tie_word_embeddings
        self.head = self.embedding if tied else get("lm_head")[0]
        self.norm = get("model.norm")[0]
        self.cos_sin = cos_sin_table(self.config, max_positions).to(self.device)
        self.layers = []
        for i in range(self.config.num_layers):
            at, layer = f"model.layers.{i}.", {}
            for view in ("", "_diff"):
                attn = at + "self_attn."
                layer["qkv" + view] = get(*(f"{attn}{n}_proj{view}" for n in "qkv"))
                layer["o" + view] = get(f"{attn}o_proj{view}")[0]
                norms = [get(f"{attn}{n}_norm{view}")[0] for n in "qk"] if self.config.qk_norm else None
                layer["qk_norms" + view] = norms
            layer["gate_up"] = get(at + "mlp.gate_proj", at + "mlp.up_proj")
            layer["down"] = get(at + "mlp.down_proj")[0]
            layer["norms"] = [get(at + n)[0] for n in ("input_layernorm", "post_attention_layernorm")]
            self.layers.append(layer)

    def rms_norm(self, x, weight):
        return functional.rms_norm(x.float(), x.shape[-1:], eps=self.config.rms_norm_eps).to(x.dtype) * weight

    def linear(self, x, matrices):
        """Products with one matrix, or with several, whose outputs are concatenated."""
        parts = [functional.linear(x, m) for m in matrices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def queries_keys_values(self, layer, x, positions, view):
        """``x`` ``[..., hidden]`` at ``positions`` ``[...]`` -> q, k, v, each ``[..., heads, head_dim]``."""
        c = self.config
        split = (c.num_heads_q, c.num_heads_kv, c.num_heads_kv)
        qkv = self.linear(x, layer["qkv" + view]).unflatten(-1, (-1, c.head_dim))
        q, k, v = qkv.split(split, dim=-2)
        if layer["qk_norms" + view]:
            q, k = (self.rms_norm(t, w) for t, w in zip((q, k), layer["qk_norms" + view], strict=True))
        cos, sin = self.cos_sin[positions].unsqueeze(-2).chunk(2, dim=-1)

        def turn(t):
            a, b = t.float().chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(t.dtype)

        return turn(q), turn(k), v

    def mlp(self, layer, x):
        gate, up = self.linear(x, layer["gate_up"]).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, layer["down"])

    def forward(self, tokens, positions, view: str, attend):
        """Hidden states of ``tokens`` (and ``positions``, same shape); ``attend(i, q, k, v)`` does attention."""
        x = self.embedding[tokens]
        for i, layer in enumerate(self.layers):
            q, k, v = self.queries_keys_values(layer, self.rms_norm(x, layer["norms"][0]), positions, view)
            x = x + functional.linear(attend(i, q, k, v).flatten(-2), layer["o" + view])
            x = x + self.mlp(layer, self.rms_norm(x, layer["norms"][1]))
        return self.rms_norm(x, self.norm)

    def choices(self, hidden):
        return functional.linear(hidden, self.head).argmax(-1)


def emitted(choices, accepted: int) -> list[int]:
    """A cycle's tokens: the accepted drafts, which are the AR view's own choices, and one more choice."""
    return choices[: accepted + 1]


class GrowingCache:
    """Baseline (a). State: ``n`` committed tokens whose keys and values are in the cache, and the known next one."""

    def __init__(self, weights: Weights, mode: str, draft_len: int):
        self.weights, self.block_len = weights, 1 if mode == "ar" else draft_len + 1
        self.n, self.cache, self.next_token = 0, [], 0

    def place(self, context: int) -> None:
        """``context`` committed tokens of random keys and values."""
        w, c = self.weights, self.weights.config
        shape = (1, c.num_heads_kv, context, c.head_dim)
        self.cache = [tuple(torch.randn(2, *shape, dtype=w.dtype, device=w.device)) for _ in w.layers]
        self.n, self.next_token = context, 1

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token after the one prompt."""
        (prompt,) = prompts
        c = self.weights.config
        empty = torch.empty(1, c.num_heads_kv, 0, c.head_dim, dtype=self.weights.dtype, device=self.weights.device)
        self.n, self.cache = 0, [(empty, empty)] * c.num_layers
        hidden = self._forward(prompt, "")
        self.n, self.next_token = len(prompt), int(self.weights.choices(hidden[-1]))
        return [self.next_token]

    def _forward(self, tokens: list[int], view: str):
        """Rows at positions n ...; AR rows stay in the cache, diffusion rows see the cache and each other."""
        w, rows = self.weights, len(tokens)
        positions = torch.arange(self.n, self.n + rows, device=w.device)
        mask = None
        if not view and rows > 1:
            mask = torch.arange(self.n + rows, device=w.device) <= positions[:, None]

        def attend(i, q, k, v):
            new = (t.transpose(0, 1).unsqueeze(0) for t in (k, v))
            keys, values = (torch.cat([old, t], dim=2) for old, t in zip(self.cache[i], new, strict=True))
            if not view:
                self.cache[i] = (keys, values)
            q = q.transpose(0, 1).unsqueeze(0)
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
            return out[0].transpose(0, 1)

        return w.forward(torch.tensor(tokens, device=w.device), positions, view, attend)

    def cycle(self, forced: list[int] | None = None) -> list[list[int]]:
        """Run one cycle and return its tokens. ``forced`` replaces the acceptance found, which is computed
        nevertheless.
        """
        drafts = []
        if self.block_len > 1:
            block = [self.next_token] + [self.weights.config.mask_token_id] * (self.block_len - 1)
            drafts = self.weights.choices(self._forward(block, "_diff")[:-1]).tolist()
        choices = self.weights.choices(self._forward([self.next_token, *drafts], "")).tolist()
        accepted = next((i for i, d in enumerate(drafts) if d != choices[i]), len(drafts))
        if forced is not None:
            accepted = min(forced[0], len(drafts))
        self.n += accepted + 1
        self.cache = [(k[:, :, : self.n], v[:, :, : self.n]) for k, v in self.cache]
        self.next_token = choices[accepted]
        return [emitted(choices, accepted)]


class StaticCache:
    """Baseline (b), ``batch`` sequences of at most ``max_len`` positions. All state is on the device."""

    def __init__(self, weights: Weights, mode: str, draft_len: int, batch: int, max_len: int):
        self.weights, self.block_len = weights, 1 if mode == "ar" else draft_len + 1
        self.batch, self.max_len, c = batch, -(-max_len // 64) * 64, weights.config  # aligned masks, for SDPA
        shape = (c.num_layers, 2, batch, self.max_len, c.num_heads_kv, c.head_dim)
        self.cache = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self.n, self.next_token, self.accepted = torch.zeros(3, batch, dtype=torch.long, device=weights.device)
        self.forced = torch.full((batch,), -1, device=weights.device)
        self.chosen = torch.zeros(batch, self.block_len, dtype=torch.long, device=weights.device)
        self._run = None

    def place(self, context: int) -> None:
        """Like :meth:`GrowingCache.place`, for every sequence."""
        self.cache.normal_()
        self.n.fill_(context)
        self.next_token.fill_(1)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token after each prompt."""
        for b, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt], device=self.weights.device)
            positions = torch.arange(len(prompt), device=self.weights.device)[None]
            hidden = self._forward(tokens, positions, "", slice(b, b + 1))
            self.n[b], self.next_token[b] = len(prompt), self.weights.choices(hidden[0, -1])
        return self.next_token.tolist()

    def _forward(self, tokens, positions, view: str, slots=slice(None)):
        """Rows ``[batch, rows]``, written in place; the verification overwrites the drafts' keys and values."""
        c = self.weights.config
        slot = torch.arange(self.batch, device=tokens.device)[slots, None]
        last = positions[:, -1:, None] if view else positions[:, :, None]  # all rows of a block see its last row
        mask = torch.arange(self.max_len, device=tokens.device) <= last.expand(-1, positions.shape[1], -1)
        per_kv = c.num_heads_q // c.num_heads_kv
        mask = mask[:, None, :, None].expand(-1, -1, -1, per_kv, -1).flatten(2, 3)
        # From booleans SDPA would make this again in every layer.
        mask = torch.zeros_like(mask, dtype=self.weights.dtype).masked_fill_(~mask, -torch.inf)

        def attend(i, q, k, v):
            keys, values = self.cache[i]
            keys[slot, positions], values[slot, positions] = k, v
            # Queries that share a key/value head become rows of it, as SDPA's fused kernels take a mask but not groups.
            grouped = q.unflatten(2, (c.num_heads_kv, per_kv)).transpose(1, 2).flatten(2, 3)
            out = functional.scaled_dot_product_attention(
                grouped, keys[slots].transpose(1, 2), values[slots].transpose(1, 2), attn_mask=mask
            )
            return out.unflatten(2, (-1, per_kv)).transpose(1, 2).flatten(2, 3)

        return self.weights.forward(tokens, positions, view, attend)

    def _cycle(self) -> None:
        positions = self.n[:, None] + torch.arange(self.block_len, device=self.n.device)
        tokens = self.next_token[:, None]
        if self.block_len > 1:
            masks = torch.full_like(positions[:, 1:], self.weights.config.mask_token_id)
            hidden = self._forward(torch.cat([tokens, masks], dim=1), positions, "_diff")
            tokens = torch.cat([tokens, self.weights.choices(hidden[:, :-1])], dim=1)
        choices = self.weights.choices(self._forward(tokens, positions, ""))
        found = (tokens[:, 1:] == choices[:, :-1]).long().cumprod(1).sum(1)
        accepted = torch.where(self.forced >= 0, self.forced, found)
        self.chosen.copy_(choices)
        self.accepted.copy_(accepted)
        self.next_token.copy_(choices.gather(1, accepted[:, None])[:, 0])
        self.n.add_(accepted + 1)

    def cycle(self, forced: list[int] | None = None) -> list[list[int]]:
        """Like :meth:`GrowingCache.cycle`, for every sequence; a replayed graph if the device has graphs."""
        if self._run is None:
            kept = [t.clone() for t in (self.n, self.next_token)]
            self._run = graphed(self._cycle, self.weights.device)
            for t, before in zip((self.n, self.next_token), kept, strict=True):
                t.copy_(before)  # recording runs a cycle first; its keys and values are overwritten
        if forced is not None:
            self.forced.copy_(torch.tensor([min(a, self.block_len - 1) for a in forced]), non_blocking=True)
        self._run()
        accepted = self.accepted.tolist()
        return [emitted(row, a) for row, a in zip(self.chosen.tolist(), accepted, strict=True)]


def generate(baseline, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], int]:
    """``(tokens of each prompt, cycles)``, stop ids ignored. Every sequence runs until the last has finished."""
    tokens, cycles = [[t] for t in baseline.prefill(prompts)], 0
    while any(len(t) < max_new_tokens for t in tokens):
        for mine, new in zip(tokens, baseline.cycle(), strict=True):
            mine += new
        cycles += 1
    return [t[:max_new_tokens] for t in tokens], cycles
