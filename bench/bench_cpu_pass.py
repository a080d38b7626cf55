"""Whole passes on the CPU, in the embedded model's shapes with random weights: is a pass bound by memory or arithmetic?

    python bench/bench_cpu_pass.py --rows 1 4 6 8 16 32 --out bench/results/cpu

A pass is ``rows`` AR rows of one sequence behind ``context`` cached tokens, argmax of every row included; it is
recorded on a tape and replayed. Per-op columns time a tape of that op's calls alone.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

import torch
from common import header, measure, read_bandwidth, report
from models import RandomTensors

from orthrus_rt import dispatch, native
from orthrus_rt.checkpoint import Checkpoint, expected_tensors
from orthrus_rt.config import ModelConfig
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Activations, Model, Workspace, forward
from orthrus_rt.plan import prefill_rows

OPS = ("row_linear", "dual_attn", "qkv_commit", "rms_norm", "embed")
CONFIG = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads_q=9,
    num_heads_kv=3, head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
    qk_norm=False, block_len=16, mask_token_id=15, eos_token_ids=(2,),
    rope={"rope_type": "default", "rope_theta": 1e5}, name="random 135M",
)  # fmt: skip


def record(model: Model, kv: PagedKvCache, num_rows: int, context: int, max_seq_len: int, only: str | None = None):
    """A tape of one pass; of the calls of one op where ``only`` names it."""
    rows = prefill_rows(torch.arange(num_rows, dtype=torch.int32), context, 0)
    partials = model.lm_head.num_partials
    buffers = [
        rows,
        Activations(model, num_rows, 0),
        torch.arange(num_rows, dtype=torch.int32),
        (torch.empty(num_rows, partials), torch.empty(num_rows, partials, dtype=torch.int32)),
    ]
    for tensor in vars(buffers[1]).values():
        tensor.fill_(0.1)  # a tape of one op reads what no other op wrote
    tape = dispatch.native().cpu.Tape()
    silent = [mock.patch.object(native, op, lambda *_, **__: None) for op in OPS if only not in (None, op)]
    for patch in silent:
        patch.start()
    with tape.record():
        forward(
            model, kv, rows, buffers[1], Workspace(None, None), logit_rows=buffers[2], epilogue="argmax",
            out=buffers[3], max_seq_len=max_seq_len,
        )  # fmt: skip
    mock.patch.stopall()
    return tape, buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 6, 8, 16, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", help="portable, avx2 or avx512_bf16; the best one by default")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--ops", action="store_true", help="also time each op's calls alone")
    parser.add_argument("--out", help="folder for the JSON and the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu, device = dispatch.native().cpu, torch.device("cpu")
    if args.isa:
        cpu.set_isa(args.isa)
    max_seq_len = args.context + max(args.rows)
    model = Model(
        Checkpoint(CONFIG, RandomTensors(expected_tensors(CONFIG), device), None),
        device=device, dtype=torch.bfloat16, max_seq_len=max_seq_len,
    )  # fmt: skip
    kv = PagedKvCache(CONFIG, num_slots=1, max_seq_len=max_seq_len, num_pages=2 + max_seq_len // 64, device=device,
                      dtype=torch.bfloat16)  # fmt: skip
    kv.pages.normal_()
    kv.reserve(0, max_seq_len)
    bandwidth, weight_bytes = read_bandwidth(device), model.nbytes()["ar"]
    facts = header(device) | {
        "load average": os.getloadavg()[0],
        "isa": cpu.isa(), "context": args.context, "weights": weight_bytes // 2, "read GB/s": bandwidth
    }  # fmt: skip
    table = []
    for n in args.rows:
        tape, _buffers = record(model, kv, n, args.context, max_seq_len)
        us = measure(tape.replay, device, repeats=args.repeats)
        rate = weight_bytes / us["p50"] * 1e-3
        row = {"rows": n} | {f"ms {name}": value * 1e-3 for name, value in us.items()}
        row |= {"GB/s": rate, "of read": rate / bandwidth, "GFLOP/s": n * weight_bytes / us["p50"] * 1e-3}
        for op in OPS if args.ops else ():
            tape, _buffers = record(model, kv, n, args.context, max_seq_len, op)
            row[f"{op} ms"] = measure(tape.replay, device, repeats=args.repeats)["p50"] * 1e-3
        table.append(row)
    report("cpu_pass", facts, table, args.out)


if __name__ == "__main__":
    main()
