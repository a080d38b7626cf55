"""The network: the weights of both views and one forward pass over a row plan. It knows nothing of modes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from orthrus_rt import native, nvtx, ops, weights
from orthrus_rt.checkpoint import Checkpoint, head_name
from orthrus_rt.config import CheckpointError, ModelConfig
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.room import check_weights
from orthrus_rt.rope import cos_sin_table
from orthrus_rt.rows import Rows
from orthrus_rt.state import empty_partials, num_score_tiles
from orthrus_rt.weights import PackedWeight


@dataclass
class Layer:
    """One decoder layer. ``*_diff`` belong to the diffusion view, everything else serves both views."""

    input_norm: torch.Tensor
    qkv: PackedWeight
    qkv_diff: PackedWeight
    qk_norms: tuple[torch.Tensor, ...] | None  # q, k, q_diff, k_diff
    o: PackedWeight
    o_diff: PackedWeight
    post_attn_norm: torch.Tensor
    gate_up: PackedWeight
    down: PackedWeight

    @property
    def ar_weights(self) -> tuple[PackedWeight, ...]:
        """What an AR pass multiplies by."""
        return self.qkv, self.o, self.gate_up, self.down


class Model:
    """The weights, on one device in one dtype, packed for the chosen ``row_linear``."""

    def __init__(self, checkpoint: Checkpoint, *, device, dtype: torch.dtype, max_seq_len: int):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.config: ModelConfig = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.softmax_scale = config.head_dim**-0.5
        ops.check_head_dim(config.head_dim, self.device, dtype)
        check_weights(config, self.device, dtype)
        self.cos_sin = cos_sin_table(config, max_seq_len).to(self.device)

        def get(name):
            stored = tensors[name]
            weight = stored.to(device=self.device, dtype=dtype)
            if torch.finfo(dtype).max < torch.finfo(stored.dtype).max:
                low, high = weight.aminmax()
                if not (low.isfinite() and high.isfinite()):
                    raise CheckpointError(f"{config.name}: {name} holds numbers that {dtype} cannot represent")
            return weight

        def norm(name):
            # A copy also if it is fp32: each view of the file would keep a mapping of all of it.
            return tensors[name].to(device=self.device, dtype=torch.float32, copy=True).contiguous()

        def joined(*names):
            return torch.cat([get(n) for n in names]) if len(names) > 1 else get(names[0])

        def pack_views(*names):
            of_views = (joined(*(name + f"_proj{view}.weight" for name in names)) for view in ("", "_diff"))
            return weights.pack_views(*of_views)

        self.embedding = get("model.embed_tokens.weight").contiguous()
        self.lm_head = weights.pack(get(head_name(config)))
        self.final_norm = norm("model.norm.weight")
        self.layers = []
        for i in range(config.num_layers):
            p, attn = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
            qk_norms = None
            if config.qk_norm:
                qk_norms = tuple(norm(f"{attn}{n}.weight") for n in ("q_norm", "k_norm", "q_norm_diff", "k_norm_diff"))
            (qkv, qkv_diff), (o, o_diff) = pack_views(*(attn + n for n in "qkv")), pack_views(attn + "o")
            self.layers.append(
                Layer(
                    input_norm=norm(p + "input_layernorm.weight"),
                    qkv=qkv,
                    qkv_diff=qkv_diff,
                    qk_norms=qk_norms,
                    o=o,
                    o_diff=o_diff,
                    post_attn_norm=norm(p + "post_attention_layernorm.weight"),
                    gate_up=weights.pack(joined(*(f"{p}mlp.{n}_proj.weight" for n in ("gate", "up"))), gate_up=True),
                    down=weights.pack(get(p + "mlp.down_proj.weight")),
                )
            )

    def linear_shapes(self) -> set[tuple[int, int]]:
        """Every weight's ``(in_features, out_features)``."""
        return {(w.in_features, w.out_features) for w in (*self.layers[0].ar_weights, self.lm_head)}

    def nbytes(self) -> dict[str, int]:
        """Bytes of the packed weights: ``ar``, ``diffusion`` (its own projections) and the embedding table."""
        ar = self.lm_head.nbytes + sum(w.nbytes for layer in self.layers for w in layer.ar_weights)
        diffusion = sum(w.nbytes for layer in self.layers for w in (layer.qkv_diff, layer.o_diff))
        return {"ar": ar, "diffusion": diffusion, "embedding": self.embedding.nbytes}


class Activations:
    """Buffers of one forward pass for at most ``max_rows`` rows, of which ``max_rows_diff`` are of the diffusion view.

    Every layer reuses them, so they do not grow with depth or context.
    """

    def __init__(self, model: Model, max_rows: int, max_rows_diff: int, max_logit_rows: int = 0):
        c, kw = model.config, dict(dtype=model.dtype, device=model.device)
        self.hidden = torch.empty(max_rows, c.hidden_size, **kw)
        self.normed = torch.empty(max_rows, c.hidden_size, **kw)
        self.qkv = torch.empty(max_rows, (c.num_heads_q + 2 * c.num_heads_kv) * c.head_dim, **kw)
        self.q = torch.empty(max_rows, c.num_heads_q, c.head_dim, **kw)
        self.attn = torch.empty(max_rows, c.num_heads_q, c.head_dim, **kw)
        self.mlp = torch.empty(max_rows, c.intermediate_size, **kw)
        self.scratch_k = torch.empty(max_rows_diff, c.num_heads_kv, c.head_dim, **kw)
        self.scratch_v = torch.empty(max_rows_diff, c.num_heads_kv, c.head_dim, **kw)
        self._logits = torch.empty(0, c.vocab_size, dtype=torch.float32, device=model.device)
        self._max_logit_rows = max_logit_rows
        self._partials = {"logits": empty_partials(max_logit_rows, model.lm_head.num_partials, model.device)}

    def logits(self, num_rows: int) -> torch.Tensor:
        """fp32 ``[num_rows, vocab_size]``, at most ``max_logit_rows``; allocated on first use, as greedy decoding
        materialises no logits.
        """
        if not self._logits.shape[0]:
            self._logits = self._logits.new_empty(self._max_logit_rows, self._logits.shape[1])
        return self._logits[:num_rows]

    def partials(self, num_rows: int, of: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``(value, id)``, fp32 and int32 ``[num_rows, n]``: partial maxima of the head's ``"logits"`` or of
        ``"scores"`` (allocated on first use), at most ``max_logit_rows`` rows. Every pass uses the same memory, as its
        choices are taken before the next pass.
        """
        if of not in self._partials:
            num_tiles = num_score_tiles(self._logits.shape[1])
            self._partials[of] = empty_partials(self._max_logit_rows, num_tiles, self.hidden.device)
        value, index = self._partials[of]
        return value[:num_rows], index[:num_rows]

    @property
    def nbytes(self) -> int:
        held = itertools.chain(vars(self).values(), *self._partials.values())
        return sum(t.nbytes for t in held if isinstance(t, torch.Tensor))


@dataclass
class Workspace:
    """Scratch memory of the kernels; None where they need none. That of row_linear is zeroed once.

    ``graph_pool`` is the memory pool of all recordings, which can share it as only one replays at a time.
    """

    linear: torch.Tensor | None
    attn: torch.Tensor | None
    graph_pool: object | None = None

    @staticmethod
    def allocate(model: Model, *, max_rows: int, max_seq_len: int) -> Workspace:
        c, where = model.config, (model.device, model.dtype, max_rows)
        linear = native.row_linear_workspace_bytes(*where, model.linear_shapes())
        attn = native.dual_attn_workspace_bytes(*where, c.num_heads_q, c.head_dim, max_seq_len)

        def room(nbytes, make):
            return make(nbytes, dtype=torch.uint8, device=model.device) if nbytes else None

        pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        return Workspace(room(linear, torch.zeros), room(attn, torch.empty), pool)


def forward(
    model: Model,
    kv: PagedKvCache,
    rows: Rows,
    act: Activations,
    workspace: Workspace,
    *,
    logit_rows: torch.Tensor | None,
    epilogue: str,
    out,
    exact: bool = True,
) -> None:
    """Run the rows through every layer; keys and values of AR rows are written to the cache.

    Args:
        logit_rows: int32 ``[n]``, the rows whose logits are wanted; None for no logits at all.
        epilogue: ``"argmax"`` or ``"logits"``, as in :func:`orthrus_rt.ops.row_linear`.
        out: that epilogue's output for n rows, MUTATED.
        exact: as in :func:`orthrus_rt.ops.row_linear`; False only if nothing but drafts depends on the pass, which then
            has no AR rows.
    """
    n = rows.num_rows
    assert exact or not rows.num_rows_ar
    hidden, normed = act.hidden[:n], act.normed[:n]
    ops.embed(rows.token, model.embedding, hidden)
    for i in range(len(model.layers)):
        _layer(model, kv, rows, act, workspace, i, exact)
    if logit_rows is not None:
        chosen = normed[: logit_rows.shape[0]]
        ops.rms_norm(hidden, model.final_norm, model.config.rms_norm_eps, chosen, logit_rows)
        ops.row_linear(chosen, model.lm_head, out, epilogue=epilogue, workspace=workspace.linear, exact=exact)


@nvtx.ranged(lambda model, kv, rows, act, workspace, i, exact: f"layer {i}")
def _layer(model: Model, kv: PagedKvCache, rows: Rows, act: Activations, workspace: Workspace, i: int, exact: bool):
    """Layer ``i``: ``act.hidden`` in, ``act.hidden`` out."""
    n, nd, eps, layer = rows.num_rows, rows.num_rows_diff, model.config.rms_norm_eps, model.layers[i]
    hidden, normed, qkv, q, attn, mlp = (
        t[:n] for t in (act.hidden, act.normed, act.qkv, act.q, act.attn, act.mlp)
    )  # fmt: skip
    scratch = (act.scratch_k[:nd], act.scratch_v[:nd])
    cache = (kv.k_pages[i], kv.v_pages[i], kv.page_table)
    linear = dict(workspace=workspace.linear, exact=exact)
    views = dict(num_rows_ar=rows.num_rows_ar, **linear)
    ops.rms_norm(hidden, layer.input_norm, eps, normed)
    o = layer.o if rows.num_rows_ar else layer.o_diff
    ops.row_linear(normed, layer.qkv, qkv, weight_diff=layer.qkv_diff, next_weight=o, **views)
    ops.qkv_commit(qkv, rows, model.cos_sin, layer.qk_norms, eps, *cache, *scratch, q)
    first = 0
    for part in rows.parts or (rows,):
        here, first = slice(first, first + part.num_rows), first + part.num_rows
        mine = (t[: part.num_rows_diff] for t in scratch)  # all diffusion rows are in the last part
        ops.dual_attn(
            q[here], *cache, *mine, part, model.softmax_scale, attn[here], max_seq_len=kv.max_seq_len,
            workspace=workspace.attn,
        )  # fmt: skip
    flat = attn.view(n, -1)
    ops.row_linear(
        flat, layer.o, hidden, weight_diff=layer.o_diff, residual=hidden, epilogue="residual",
        next_weight=layer.gate_up, **views,
    )  # fmt: skip
    ops.rms_norm(hidden, layer.post_attn_norm, eps, normed)
    ops.row_linear(normed, layer.gate_up, mlp, epilogue="silu_mul", next_weight=layer.down, **linear)
    above = model.layers[i + 1] if i + 1 < len(model.layers) else None
    ops.row_linear(
        mlp, layer.down, hidden, residual=hidden, epilogue="residual", **linear,
        next_weight=above and (above.qkv if rows.num_rows_ar else above.qkv_diff),
    )  # fmt: skip
