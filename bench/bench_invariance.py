"""What row-invariance costs: each op of a pass compared with the fastest alternative that is not row-invariant.

``row_linear`` (including its epilogue) is compared with torch's products of the same bf16 matrices (without epilogue),
and ``dual_attn`` over paged keys with SDPA over contiguous ones. ``cost`` is how much more time ours takes than the
fastest alternative, as a share; below 0, invariance is free. Weights, keys and values rotate over copies larger than
any cache.

    python -m bench.bench_invariance --out DIR                         # the embedded model's shapes
    python -m bench.bench_invariance --device cuda --model 8b --out DIR
"""

from __future__ import annotations

import torch
from torch.nn import functional

from bench.bench_dual_attn import Case, Shape
from bench.bench_row_linear import EPILOGUES, OPS
from bench.common import graphed, header, measure, parser_of, report, run_script
from bench.models import SHAPES, config_of, linear_shapes
from orthrus_rt import native, ops
from orthrus_rt.config import ModelConfig
from orthrus_rt.weights import pack

COLD_BYTES = 128 << 20  # at least, between two uses of the same copy


def least_times(candidates: dict, copies: int, device, rounds: int) -> dict[str, float]:
    """Microseconds of one call of each candidate, the minimum over ``rounds`` in which all are interleaved:
    disturbances of the machine affect all alike, and the minimum least. Each call takes the next copy. Each warms up in
    the first round.
    """

    def over_copies(run):
        for i in range(copies):
            run(i)

    ready = {name: graphed(lambda run=run: over_copies(run), device) for name, run in candidates.items()}
    least = dict.fromkeys(ready, float("inf"))
    for n in range(rounds):
        for name, run in ready.items():
            took = measure(run, device, repeats=1, warmup=int(n == 0))["p50"] / copies
            least[name] = min(least[name], took)
    return least


def linear_rows(config: ModelConfig, op: str, num_rows: list[int], device, rounds: int) -> list[dict]:
    k, n = linear_shapes(config)[op]
    bf16 = dict(dtype=torch.bfloat16, device=device)
    copies = 1 + -(-COLD_BYTES // (2 * n * k))
    plain = [(torch.randn(n, k, device=device) * k**-0.5).bfloat16()]
    plain += [plain[0].clone() for _ in range(copies - 1)]
    packed = [pack(w, gate_up=op == "gate_up") for w in plain]
    turned = [w.T.contiguous() for w in plain]

    def row(count: int) -> dict:
        x = torch.randn(count, k, **bf16)
        out = torch.empty(count, n, **bf16)
        ours_out, residual = out[:, : n // 2].contiguous() if op == "gate_up" else torch.empty_like(out), None
        if EPILOGUES[op] == "residual":
            residual = torch.randn(count, n, **bf16)
        if EPILOGUES[op] == "argmax":
            partials = packed[0].num_partials
            ours_out = tuple(torch.empty(count, partials, dtype=t, device=device) for t in (torch.float32, torch.int32))
        size = native.row_linear_workspace_bytes(device, torch.bfloat16, count, [(k, n)])
        workspace = torch.zeros(size, dtype=torch.uint8, device=device) if size else None

        def ours(i):
            rest = dict(residual=residual, epilogue=EPILOGUES[op], workspace=workspace)
            ops.row_linear(x, packed[i], ours_out, **rest)

        theirs = {
            "mm(x, W.T)": lambda i: torch.mm(x, plain[i].T, out=out),
            "mm(x, Wt)": lambda i: torch.mm(x, turned[i], out=out),
            "linear": lambda i: functional.linear(x, plain[i]),
        }
        if count == 1:
            theirs["mv"] = lambda i: torch.mv(plain[i], x[0], out=out[0])
        return compare(op, count, ours, theirs, copies, device, rounds)

    return [row(count) for count in num_rows]


def attention_row(config: ModelConfig, num_rows: int, context: int, device, rounds: int) -> dict:
    heads_q, heads_kv, head_dim = config.num_heads_q, config.num_heads_kv, config.head_dim
    case = Case(Shape(1, num_rows, 0, 0), context, (heads_q, heads_kv, head_dim), device)
    q, copies, mask, *_ = case.dense()
    repeated = [[x.repeat_interleave(heads_q // heads_kv, 1) for x in pair] for pair in copies]
    scale = head_dim**-0.5

    def sdpa(i, q, kv, mask, gqa=False):
        functional.scaled_dot_product_attention(q, *kv[i % case.copies], attn_mask=mask, enable_gqa=gqa, scale=scale)

    seen = None if num_rows == 1 else mask
    as_rows, tall = case.queries_as_rows(q), seen if seen is None else mask.repeat(heads_q // heads_kv, 1)
    theirs = {
        "sdpa, grouped": lambda i: sdpa(i, q, copies, seen, True),
        "sdpa, heads repeated": lambda i: sdpa(i, q, repeated, seen),
        "sdpa, queries as rows": lambda i: sdpa(i, as_rows, copies, tall),
    }
    calls = max(case.copies, 32)  # one call is too short to time
    ours = lambda i: case.call(i % case.copies)  # noqa: E731
    return compare(f"dual_attn, context {context}", num_rows, ours, theirs, calls, device, rounds)


def compare(op, num_rows, ours, theirs, copies, device, rounds) -> dict:
    took = least_times({"ours": ours} | theirs, copies, device, rounds)
    mine = took.pop("ours")
    best = min(took, key=took.get)
    return {
        "op": op, "rows": num_rows, "us": mine, "fastest other": best, "other us": took[best],
        "cost": mine / took[best] - 1, "others": "; ".join(f"{n} {us:.4g}" for n, us in took.items()),
    }  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, device="cpu")
    parser.add_argument("--model", choices=SHAPES, default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device, config = args.device, config_of(args.model)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for op in OPS:
            rows += linear_rows(config, op, args.rows, device, args.rounds)
        for context in args.context:
            rows += [attention_row(config, n, context, device, args.rounds) for n in args.rows]
    facts = header(device) | {"dtype": "bfloat16", "weights": "cold", "time": f"least of {args.rounds}"}
    report(f"invariance-{args.model}", facts, rows, args.out)


if __name__ == "__main__":
    run_script(main)
