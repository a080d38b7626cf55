"""Where a cycle's time goes, op by op, at the shapes of known models with random weights: see orthrus_rt/profile.py.

``in_cycle_us`` is the figure to go by on a GPU: by how much the replayed cycle is shorter without the op. ``us`` is of
its calls one after another, between events, so that no launch overlaps with the next.

    python -m bench.bench_profile --model 8b --context 1024 --out DIR
"""

from __future__ import annotations

import torch

from bench import common
from bench.models import SHAPES, random_checkpoint
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.engine import Engine
from orthrus_rt.profile import profile


def main(argv: list[str] | None = None) -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--context", type=int, default=1024, help="committed tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--block-len", type=int, default=32, help="K of the checkpoint")
    parser.add_argument("--draft-len", type=int, help="drafts per cycle; K-1 by default")
    parser.add_argument("--fan-out", type=int, help="blocks that a one_pass cycle drafts; the engine's own by default")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    positions = args.context + 2 * args.block_len
    draft_len = args.block_len - 1 if args.draft_len is None else args.draft_len
    facts, rows = common.header(args.device), []
    with torch.inference_mode():
        engine = Engine(
            random_checkpoint(args.model, args.device, args.block_len), device=args.device, dtype=torch.bfloat16,
            mode="two_pass", max_seq_len=positions, draft_len=draft_len, fan_out=args.fan_out,
            max_batch_size=args.batch, num_pages=None, prefix_caching=False,
        )  # fmt: skip
    with engine:
        how = {"draft_len": draft_len, "batch": args.batch, "context": args.context, "repeats": args.repeats}
        for mode in args.modes:
            fan_out = args.fan_out if mode == "one_pass" else None
            about, calls = profile(engine, mode=mode, fan_out=fan_out, **how)
            facts[mode] = ", ".join(f"{name} {common.figures(value)}" for name, value in about.items())
            rows += [{"mode": mode} | row for row in calls]
            common.save(f"profile-{args.model}", facts, rows, args.out)
    common.report(f"profile-{args.model}", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
