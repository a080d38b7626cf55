"""How long one decode cycle takes: official shapes with random weights, against the bandwidth floor.

A cycle's time does not depend on what it accepts (every shape is static), so random weights time it truly;
tokens per second follow from the acceptance that a trained model has. The floor is the bytes a cycle must
read (weights of each pass, committed keys and values) over the measured read bandwidth.

    python -m bench.bench_decode --model 8b --context 1024 --out DIR
"""

from __future__ import annotations

import argparse

import torch

from bench import common
from bench.models import SHAPES, random_checkpoint
from orthrus_rt import state as st
from orthrus_rt.engine import Engine
from orthrus_rt.graph import Cycle
from orthrus_rt.ops import PAGE_SIZE
from orthrus_rt.rope import cos_sin_table
from orthrus_rt.runner import Runner


def make_cycle(engine: Engine, mode: str, slots: int, context: int, block_len: int) -> Cycle:
    """A cycle of ``slots`` running sequences, each with ``context`` committed tokens of random keys and values."""
    model, config = engine.model, engine.config
    pages = -(-(context + 4 * block_len) // PAGE_SIZE)
    runner = Runner(
        model, num_slots=slots, max_seq_len=pages * PAGE_SIZE, block_len=block_len, num_pages=1 + slots * pages,
        max_stop_ids=4,
    )  # fmt: skip
    model.cos_sin = cos_sin_table(config, pages * PAGE_SIZE).to(model.device)
    runner.kv.pages.normal_()
    for slot in range(slots):
        runner.kv.reserve(slot, pages * PAGE_SIZE)
    runner.state.limit.fill_(pages * PAGE_SIZE)
    runner.state.block_tokens.fill_(7)
    return runner.cycle(mode, 1 if mode == "ar" else block_len, slots)


def bytes_per_cycle(engine: Engine, mode: str, slots: int, context: int) -> int:
    """Least bytes read by one cycle: each pass's weights once, and every sequence's cache once per pass."""
    sizes, c = engine.model.nbytes(), engine.config
    cache = 2 * slots * context * c.num_layers * c.num_heads_kv * c.head_dim * 2
    verify = sizes["ar"] + cache
    if mode == "ar":
        return verify
    own_ar = sum(layer.qkv.nbytes + layer.o.nbytes for layer in engine.model.layers)
    return verify + sizes["ar"] - own_ar + sizes["diffusion"] + cache


def time_cycle(cycle: Cycle, context: int, repeats: int) -> dict[str, float]:
    """Microseconds per replay: p50, p20, p80. Every cycle commits a token or a few, which the pages have room for."""
    state = cycle.state
    state.cache_seqlens.fill_(context)
    state.finish.fill_(st.RUNNING)
    return common.measure(cycle.run, cycle.model.device, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", nargs="+", default=["ar", "two_pass"])
    parser.add_argument("--block-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="folder for the JSON and the table")
    args = parser.parse_args()
    device = torch.device(args.device)
    with torch.inference_mode():
        engine = Engine(
            random_checkpoint(args.model, device, args.block_len), device=device, dtype=torch.bfloat16, mode="two_pass",
            max_seq_len=128, draft_len=None, max_batch_size=1, num_pages=None,
        )  # fmt: skip
        bandwidth = common.read_bandwidth(device)
        rows = []
        for context in args.context:
            for slots in args.batch:
                for mode in args.modes:
                    cycle = make_cycle(engine, mode, slots, context, args.block_len)
                    times = time_cycle(cycle, context, args.repeats)
                    floor = bytes_per_cycle(engine, mode, slots, context) / bandwidth * 1e-6
                    rows.append(
                        {
                            "model": args.model,
                            "mode": mode,
                            "block_len": 1 if mode == "ar" else args.block_len,
                            "batch": slots,
                            "context": context,
                            "ms_per_cycle": times["p50"] / 1e3,
                            "p20_ms": times["p20"] / 1e3,
                            "p80_ms": times["p80"] / 1e3,
                            "floor_ms": floor,
                            "floor_over_time": floor / times["p50"] * 1e3,
                        }
                    )
                    print(rows[-1], flush=True)
    facts = common.header(device) | {"read_bandwidth_gb_s": bandwidth}
    common.report(f"decode-{args.model}", facts, rows, args.out)


if __name__ == "__main__":
    main()
