"""dual_attn compared with the bandwidth of its keys and values, SDPA, compiled FlexAttention and flash-attn.

    python -m bench.bench_dual_attn --heads 32,8,128 --out DIR

Each call reads another copy of the keys and values, so that none are in L2 (or a CPU's L3). Bytes are the visible keys
and values, once per sequence; FLOPs count visible keys only. On a CPU, runs of the op and the baselines are
interleaved.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import header, loop, measure_in_turns, parser_of, read_bandwidth, report, run_script, save
from orthrus_rt import dispatch, huge_pages, native, ops
from orthrus_rt.pages import PAGE_SIZE, num_pages
from orthrus_rt.rows import Layout, empty_rows

COLD_BYTES = 200 << 20  # of cache copies: several times the size of any L2, or a CPU's L3


@dataclass(frozen=True)
class Shape:
    """``batch`` sequences with ``context`` cached tokens, each with AR rows and diffusion blocks on top."""

    batch: int
    ar_rows: int
    blocks: int
    block_len: int

    def __str__(self):
        parts = [f"{self.ar_rows} ar"] if self.ar_rows else []
        parts += [f"{self.blocks}x{self.block_len} diff"] if self.blocks else []
        return (f"{self.batch} x " if self.batch > 1 else "") + " + ".join(parts)

    @property
    def rows(self):
        return self.batch * (self.ar_rows + self.blocks * self.block_len)


DECODE = [
    Shape(1, 1, 0, 0), Shape(1, 16, 0, 0), Shape(1, 32, 0, 0), Shape(1, 0, 1, 32), Shape(1, 16, 1, 16),
    Shape(1, 4, 4, 4), Shape(1, 4, 4, 16), Shape(1, 16, 4, 16), Shape(1, 16, 6, 16), Shape(1, 32, 2, 32),
    Shape(16, 1, 0, 0), Shape(16, 16, 0, 0),
]  # fmt: skip


class Case:
    def __init__(self, shape: Shape, context: int, heads, device):
        self.shape, self.context, self.device = shape, context, device
        self.heads_q, self.heads_kv, self.dim = heads
        batch, blocks, n_ar = shape.batch, shape.batch * shape.blocks, shape.batch * shape.ar_rows
        layout = Layout(batch if n_ar else 0, shape.ar_rows, blocks, shape.block_len, max(shape.blocks, 1))
        self.rows = empty_rows(layout, device)
        offset = torch.cat([torch.arange(shape.ar_rows).repeat(batch), torch.arange(shape.block_len).repeat(blocks)])
        slots, per_slot = torch.arange(batch), (shape.ar_rows, shape.blocks * shape.block_len)
        self.rows.seq.copy_(torch.cat([slots.repeat_interleave(n) for n in per_slot]))
        self.rows.position.copy_(context + offset)
        self.rows.prefix_len.fill_(context)
        self.rows.prefix_len[:n_ar] += offset[:n_ar].to(device) + 1
        self.cached = context + shape.ar_rows
        self.max_seq_len = num_pages(max(self.cached, 4096)) * PAGE_SIZE
        columns = num_pages(self.cached)
        page_bytes = self.heads_kv * PAGE_SIZE * self.dim * 4
        self.copies = -(-COLD_BYTES // (page_bytes * columns * shape.batch))
        total = 1 + self.copies * shape.batch * columns
        bf16 = dict(dtype=torch.bfloat16, device=device)
        shape_kv = torch.Size((total, self.heads_kv, PAGE_SIZE, self.dim))
        self.k_pages, self.v_pages = (
            huge_pages.empty(shape_kv, torch.bfloat16, device).normal_() for _ in range(2)
        )  # as in the engine
        order = torch.randperm(total - 1, device=device).int() + 1
        self.page_tables = order.view(self.copies, shape.batch, columns)
        pad = (0, self.max_seq_len // PAGE_SIZE - columns)
        self.wide_tables = [functional.pad(t, pad, value=-1).contiguous() for t in self.page_tables]
        n_diff = self.rows.num_rows_diff
        self.q = torch.randn(self.rows.num_rows, self.heads_q, self.dim, **bf16)
        self.scratch = (
            [torch.randn(n_diff, self.heads_kv, self.dim, **bf16) for _ in range(2)] if n_diff else [None] * 2
        )
        self.out = torch.empty_like(self.q)
        size = native.dual_attn_workspace_bytes(
            device, torch.bfloat16, self.rows.num_rows, self.heads_q, self.dim, self.max_seq_len
        )
        self.workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)

    def call(self, copy=0):
        args = (self.q, self.k_pages, self.v_pages, self.wide_tables[copy], *self.scratch, self.rows)
        ops.dual_attn(*args, self.dim**-0.5, self.out, max_seq_len=self.max_seq_len, workspace=self.workspace)

    @property
    def nbytes(self):
        shape = self.shape
        keys = shape.batch * (self.cached + shape.blocks * shape.block_len)
        return keys * self.heads_kv * self.dim * 4 + 4 * self.q.numel()

    @property
    def flops(self):
        keys = int(self.rows.prefix_len.sum()) + self.rows.num_rows_diff * self.shape.block_len
        return 4 * keys * self.heads_q * self.dim

    def order(self):
        """Row indices as [batch, rows of a sequence]: its AR rows, then its blocks."""
        seq = self.rows.seq.long()
        return torch.argsort(seq, stable=True).view(self.shape.batch, -1)

    def dense(self):
        """For dense attention: q, and per copy k and v, each [batch, heads, length, dim]; the mask [rows, keys]."""
        order, shape = self.order(), self.shape
        q = self.q[order].transpose(1, 2).contiguous()
        copies = []
        for table in self.page_tables:
            pair = []
            for pages, scratch in zip((self.k_pages, self.v_pages), self.scratch, strict=True):
                x = pages[table.long()].transpose(2, 3).flatten(1, 2)[:, : self.cached]
                if scratch is not None:
                    x = torch.cat([x, scratch.view(shape.batch, -1, self.heads_kv, self.dim)], 1)
                pair.append(x.transpose(1, 2).contiguous())
            copies.append(pair)
        prefix = self.rows.prefix_len[order[0]]
        block = torch.arange(q.shape[2], device=self.device) - shape.ar_rows
        block = torch.where(block < 0, -1, block // max(shape.block_len, 1))
        cached = torch.arange(self.cached, device=self.device)[None] < prefix[:, None]
        own = block[:, None] == torch.arange(shape.blocks, device=self.device).repeat_interleave(shape.block_len)[None]
        return q, copies, torch.cat([cached, own], 1), prefix, block

    def queries_as_rows(self, q):
        """Queries that share a key/value head become rows of it, as SDPA's fused kernels take a mask but not groups."""
        return q.unflatten(1, (self.heads_kv, -1)).flatten(2, 3)

    def max_error(self):
        """Largest error compared with float64, over at most 64 rows of the first sequence."""
        q, copies, mask, *_ = self.dense()
        k, v = (x[:1].double() for x in copies[0])
        rows = slice(0, 64)
        bias = torch.zeros(mask[rows].shape, dtype=torch.float64, device=self.device).masked_fill(
            ~mask[rows], -torch.inf
        )
        repeat = self.heads_q // self.heads_kv
        want = torch.stack([
            functional.scaled_dot_product_attention(q[0, h, rows].double(), k[0, h // repeat], v[0, h // repeat], bias)
            for h in range(self.heads_q)
        ])  # fmt: skip
        self.out.fill_(torch.nan)
        self.call()
        got = self.out[self.order()[0, rows]].transpose(0, 1)
        return float((got.double() - want).abs().max())


def over_copies(case: Case, runs):
    """Microseconds of one call of each run, every call on the next copy of the cache."""

    def all_copies(run):
        for i in range(case.copies):
            run(i)

    repeats = 20 if case.device.type == "cuda" else 7  # each of one call per copy, which takes minutes on a CPU
    turns = {name: partial(all_copies, run) for name, run in runs.items()}
    took = measure_in_turns(turns, case.device, repeats=repeats)
    return {name: {k: v / case.copies for k, v in us.items()} for name, us in took.items()}


def baselines(case: Case):
    """Each dense attention available here that supports this mask, by name."""
    q, copies, mask, *_ = case.dense()

    def sdpa(i):
        scale = case.dim**-0.5
        functional.scaled_dot_product_attention(q, *copies[i], attn_mask=mask, enable_gqa=True, scale=scale)

    as_rows, tall = case.queries_as_rows(q), mask.repeat(case.heads_q // case.heads_kv, 1)

    def sdpa_as_rows(i):
        functional.scaled_dot_product_attention(as_rows, *copies[i], attn_mask=tall, scale=case.dim**-0.5)

    ways = {"sdpa": sdpa, "sdpa, queries as rows": sdpa_as_rows}
    if importlib.util.find_spec("flash_attn") and not case.shape.blocks:
        from flash_attn import flash_attn_func

        def flash(i):
            args = (x.transpose(1, 2) for x in (q, *copies[i]))
            flash_attn_func(*args, softmax_scale=case.dim**-0.5, causal=True)

        ways["flash-attn"] = flash
    return ways


def flex_us(case: Case) -> float:
    """Microseconds of FlexAttention compiled for this very shape and mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, copies, mask, prefix, block = case.dense()
    cached, block_len = case.cached, max(case.shape.block_len, 1)

    def visible(b, h, row, key):
        own = (block[row] >= 0) & (key >= cached) & ((key - cached) // block_len == block[row])
        return ((key < cached) & (key < prefix[row])) | own

    torch.compiler.reset()  # otherwise the limit on recompilations would leave later shapes uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = create_block_mask(visible, None, None, q.shape[2], mask.shape[1], device=case.device)
    kwargs = dict(block_mask=block_mask, enable_gqa=True, scale=case.dim**-0.5)
    return over_copies(case, {"flex": lambda i: compiled(q, *copies[i], **kwargs)})["flex"]["p50"]


def prefill_baseline(case: Case):
    q, copies, *_ = case.dense()

    def flash(i):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            functional.scaled_dot_product_attention(q, *copies[i], is_causal=True, enable_gqa=True)

    return {"sdpa flash": flash}


def time_case(case: Case, baseline: bool, flex: bool):
    """Percentiles of the op, and (name, microseconds) of every baseline."""
    ways = {} if not baseline else baselines(case) if case.context else prefill_baseline(case)
    took = over_copies(case, {"own": case.call} | ways)
    found = [(name, took[name]["p50"]) for name in ways]
    if baseline and flex and case.context and case.device.type == "cuda":
        try:
            found.append(("flex", flex_us(case)))
        except Exception as error:  # a baseline that does not support a shape must not end the measurement
            print(f"flex: {case.shape}, context {case.context}: {type(error).__name__}: {error}", file=sys.stderr)
    return took["own"], found


def main() -> int:
    parser = parser_of(__doc__, device="auto")
    parser.add_argument("--heads", default="32,8,128", help="query heads, key/value heads, head_dim")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 40000])
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 4096, 8192], help="prompts prefilled at once")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, compiled for every shape")
    parser.add_argument("--loop", type=int, help="run the first shape this often under an NVTX range, for a profiler")
    args = parser.parse_args()
    device = args.device
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", args.heads):
        parser.error(f"--heads must be three numbers, such as 32,8,128, got {args.heads!r}")
    heads = tuple(map(int, args.heads.split(",")))
    if heads[0] % heads[1]:
        parser.error(f"--heads: query heads must be a multiple of the key/value heads, got {args.heads}")
    if args.loop:
        looped = Case(DECODE[0], args.context[0], heads, device)
        copies = itertools.cycle(range(looped.copies))
        loop("dual_attn", lambda: looped.call(next(copies)), args.loop)
        return 0
    bandwidth, report_name = read_bandwidth(device), "dual_attn-" + args.heads.replace(",", "-")
    facts = header(device) | {"read bandwidth GB/s": bandwidth}
    cases = [(shape, context) for context in args.context for shape in DECODE if shape.rows * context < 4 << 20]
    cases += [(Shape(1, n, 0, 0), 0) for n in args.prefill]
    results = []
    for shape, context in cases:
        torch.manual_seed(0)
        case = Case(shape, context, heads, device)
        error = case.max_error()
        took, base = time_case(case, not args.no_baseline, not args.no_flex)
        name, best = min(base, key=lambda pair: pair[1], default=(None, None))
        gbs = case.nbytes / took["p50"] * 1e-3
        results.append({
            "op": "dual_attn", "impl": dispatch.select("dual_attn", device, torch.bfloat16), "rows": str(shape),
            "context": context, "heads": args.heads, "dtype": "bf16", "us p50": took["p50"], "us p20": took["p20"],
            "us p80": took["p80"], "GB/s": gbs, "share": gbs / bandwidth, "TFLOP/s": case.flops / took["p50"] * 1e-6,
            "baseline": name, "baseline us": best, "ratio": best and best / took["p50"],
            "others": "; ".join(f"{n} {us:.4g} us" for n, us in base), "max error": error,
        })  # fmt: skip
        print(*results[-1].values(), flush=True)
        save(report_name, facts, results, args.out)
        del case
    report(report_name, facts, results, args.out)
    return 0


if __name__ == "__main__":
    run_script(main)
