"""Whole passes on the CPU, in the embedded model's shapes with random weights: are they bound by memory or arithmetic?

    python -m bench.bench_cpu_pass --rows 1 4 6 8 16 32 --out DIR

A pass has ``rows`` AR rows of one sequence after ``context`` cached tokens, argmax of every row included; it is
recorded on a tape and replayed. Per-op columns time that op's calls within a pass. Where weights are coded (see
csrc/cpu/coded_weight.h), ``over plain`` is the median ratio of a pass to one over plain weights, and ``draft over
exact`` of a draft pass, whose rows are one block, to a pass of as many AR rows; runs of all of them are interleaved.
"""

from __future__ import annotations

import statistics

import torch

from bench.common import header, parser_of, percentiles, read_bandwidth, report, run_script
from bench.models import random_checkpoint
from orthrus_rt import dispatch, pages
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.prefill import prefill_rows
from orthrus_rt.profile import calls_of, time_calls
from orthrus_rt.recording import taped
from orthrus_rt.rows import Layout, Rows, empty_rows
from orthrus_rt.timing import time_each

OPS = ("row_linear", "dual_attn", "qkv_commit", "rms_norm", "embed")


def block_rows(num_rows: int, context: int) -> Rows:
    """A block of diffusion rows of slot 0."""
    rows = empty_rows(Layout(groups_diff=1, rows_diff=num_rows), "cpu")
    rows.token.copy_(torch.arange(num_rows))
    rows.position.copy_(context + torch.arange(num_rows))
    rows.prefix_len.fill_(context)
    return rows


def make_pass(model: Model, kv: PagedKvCache, num_rows: int, context: int, drafts: bool = False):
    """A function that runs one pass over buffers of its own."""
    rows = block_rows(num_rows, context) if drafts else prefill_rows([(list(range(num_rows)), context, 0)], "cpu")
    activations = Activations(model, num_rows, rows.num_rows_diff)
    logit_rows = torch.arange(num_rows, dtype=torch.int32)
    partials = model.lm_head.num_partials
    out = (torch.empty(num_rows, partials), torch.empty(num_rows, partials, dtype=torch.int32))

    def run():
        forward(
            model, kv, rows, activations, Workspace(None, None), logit_rows=logit_rows, epilogue="argmax", out=out,
            exact=not drafts,
        )  # fmt: skip

    return run


def median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def num_weights(model: Model) -> int:
    """Number of weights that a pass multiplies by."""
    packed = [w for layer in model.layers for w in layer.ar_weights]
    return sum(w.in_features * w.out_features for w in (*packed, model.lm_head))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 6, 8, 16, 32])
    parser.add_argument("--context", type=int, least=0, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", nargs="+", help="variants, such as avx2; the best one by default")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--ops", action="store_true", help="also time each op's calls alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu, device = dispatch.extension().cpu, torch.device("cpu")
    for isa in args.isa or ():
        try:
            cpu.set_isa(isa)
        except RuntimeError as error:
            parser.error(str(error).replace("ORTHRUS_CPU_ISA", "--isa"))
    max_seq_len = args.context + max(args.rows)
    checkpoint, on_device = random_checkpoint("135m", device), dict(device=device, dtype=torch.bfloat16)
    num_pages = pages.num_pages(max_seq_len)
    kv = PagedKvCache(checkpoint.config, num_slots=1, max_seq_len=max_seq_len, num_pages=num_pages, **on_device)
    kv.pages.normal_()
    kv.reserve(0, max_seq_len)

    def packed_for(isa: str) -> Model:
        cpu.set_isa(isa)
        return Model(checkpoint, max_seq_len=max_seq_len, **on_device)

    facts, table = header(device) | {"context": args.context}, []
    for isa in args.isa or [cpu.isa()]:
        models = [packed_for(isa)]
        weight_bytes, coded = models[0].nbytes()["ar"], models[0].lm_head.coded
        if coded:
            models.append(packed_for("portable"))
            cpu.set_isa(isa)
        for n in args.rows:
            passes = [make_pass(model, kv, n, args.context) for model in models]
            if drafted := coded and n <= checkpoint.config.block_len:
                passes.append(make_pass(models[0], kv, n, args.context, drafts=True))
            times = time_each([taped(run).replay for run in passes], device, repeats=args.repeats)
            us, bandwidth = percentiles(times[0]), read_bandwidth(device)
            rate = weight_bytes / us["p50"] * 1e-3
            row = {"isa": isa, "rows": n} | {f"ms {name}": value * 1e-3 for name, value in us.items()}
            row["over plain"] = median_ratio(times[0], times[1]) if coded else None
            row["draft over exact"] = median_ratio(times[2], times[0]) if drafted else None
            row |= {"weight MB": weight_bytes * 1e-6, "GB/s": rate, "read GB/s": bandwidth, "of read": rate / bandwidth}
            row |= {"GFLOP/s": 2 * n * num_weights(models[0]) / us["p50"] * 1e-3}
            if args.ops:
                calls = calls_of(passes[0])
                ms = [us * 1e-3 for us in time_calls(calls, device, repeats=args.repeats)]
                row |= {f"{op} ms": sum(t for c, t in zip(calls, ms, strict=True) if c.op == op) for op in OPS}
            table.append(row)
    report("cpu_pass", facts | {"weights": num_weights(models[0])}, table, args.out)


if __name__ == "__main__":
    run_script(main)
