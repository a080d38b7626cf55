"""Host time per cycle, on a device that takes no time: no cycle is shorter than this, however fast its kernels are.

Every cycle is replaced by one that emits the same number of tokens for every sequence and computes nothing. Scheduling,
the policy of ``auto``, reading results and making outputs are the engine's own, as are on CUDA the events and the copy
of results. On CUDA the host is a cycle ahead, so that cycles whose kernels take longer than this do not wait for it.

    python -m bench.bench_host --out DIR
"""

from __future__ import annotations

import time
from unittest import mock

import torch

from bench import common
from bench.models import random_checkpoint
from orthrus_rt import cycle_plan
from orthrus_rt.cycle import Cycle
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams

DRAFT_LEN, ACCEPTED = 15, 2  # drafts per cycle, if it has any, and accepted drafts
WARM_UP = 64  # cycles
MODES = (*cycle_plan.MODES, "auto")


class Instant(Cycle):
    """Emits arbitrary tokens for every slot."""

    steady = True

    def run(self) -> None:
        drafts = self.plan.block_len - 1
        self.state.num_verified.fill_(drafts)
        self.state.num_accepted.fill_(min(ACCEPTED, drafts))
        self.state.num_output.add_(1 + min(ACCEPTED, drafts))


def microseconds(device: torch.device, mode: str, batch: int, cycles: int) -> list[float]:
    """Time of every step of ``batch`` sequences."""
    most = 16 + (1 + ACCEPTED) * (WARM_UP + cycles + 2)
    with mock.patch("orthrus_rt.runner.Cycle", Instant):
        engine = Engine(
            random_checkpoint("tiny", device, 16), device=device, dtype=torch.bfloat16, mode=mode, max_seq_len=most,
            draft_len=DRAFT_LEN, fan_out=6 if mode == "one_pass" else None, max_batch_size=batch, num_pages=None,
            prefix_caching=True,
        )  # fmt: skip
        with engine:
            for i in range(batch):
                engine.submit([1 + i, 2, 3], SamplingParams(max_new_tokens=most, ignore_eos=True))
            for _ in range(WARM_UP):
                engine.step()
            times = []
            for _ in range(cycles):
                start = time.perf_counter()
                outputs = engine.step()
                times.append(1e6 * (time.perf_counter() - start))
                assert len(outputs) == batch and not any(out.finished for out in outputs)
    return times


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--cycles", type=int, default=1000)
    args = parser.parse_args()
    rows = []
    for mode in args.modes:
        for batch in args.batch:
            times = microseconds(args.device, mode, batch, args.cycles)
            us = common.percentiles(times)
            rows.append({"mode": mode, "batch": batch, "mean_us": sum(times) / len(times), "us": us["p50"]})
            rows[-1] |= {"p20": us["p20"], "p80": us["p80"]}
    facts = {"draft_len": DRAFT_LEN, "accepted drafts of a cycle, simulated": ACCEPTED}
    common.report(f"host-{args.device.type}", common.header(args.device) | facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
