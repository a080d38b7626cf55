"""Shared by the benchmarks of ops that take microseconds: many calls in one run, replayed from a CUDA graph or, on the
CPU, from a tape, as in the engine, so that launching costs the host nothing. There are no tapes of torch's calls, so on
a CPU their times include dispatch by Python and torch.

An op reads its inputs from a cache, as in a pass (except embed), where the preceding op has just written them. Shares
of memory bandwidth may therefore exceed 1, and few rows cost a launch, whatever their bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.common import header, loop, measure_in_turns, parser_of, read_bandwidth, report
from bench.models import SHAPES, config_of
from orthrus_rt import dispatch
from orthrus_rt.config import ModelConfig
from orthrus_rt.recording import replay, taped

CALLS = 64  # per timed run


class Case:
    """An op over tensors for ``num_rows`` rows of a model, which a subclass creates.

    Attributes:
        op, baseline: their names.
        nbytes: bytes that a call reads and writes.
    """

    op: str
    baseline: str
    nbytes: int

    def __init__(self, config: ModelConfig, num_rows: int, device: torch.device):
        self.config, self.device = config, device

    def randn(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device).bfloat16()

    def call(self) -> None:
        """The op."""
        raise NotImplementedError

    def call_baseline(self) -> torch.Tensor:
        """The same by torch; returns the result."""
        raise NotImplementedError

    def max_error(self) -> float:
        """Largest difference from the oracle, relative to the largest value; 0.004 is a bf16 rounding."""
        raise NotImplementedError


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max())


def over_and_over(run: Callable[[], None]) -> Callable[[], None]:
    def runs():
        for _ in range(CALLS):
            run()

    return runs


def times(case: Case, repeats: int = 50) -> tuple[dict[str, float], float]:
    """Microseconds of one call: percentiles of the op, and the baseline's p50."""
    own, baseline = over_and_over(case.call), over_and_over(case.call_baseline)
    if case.device.type == "cpu" and dispatch.select(case.op, case.device, torch.bfloat16) == "cpu":
        tape = taped(own)
        own = lambda: replay(tape)  # noqa: E731
    took = measure_in_turns({"own": own, "baseline": baseline}, case.device, repeats=repeats)
    return {name: us / CALLS for name, us in took["own"].items()}, took["baseline"]["p50"] / CALLS


def report_on(case_type: type[Case], doc: str) -> None:
    """The script of one op, whose docstring is ``doc``."""
    parser = parser_of(doc, device="auto")
    parser.add_argument("--model", nargs="+", default=["1.7b", "4b", "8b"], choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 128, 2048])
    parser.add_argument("--loop", type=int, help="run the first shape this often under an NVTX range, for a profiler")
    args = parser.parse_args()
    op, device = case_type.op, args.device
    if args.loop:
        loop(op, case_type(config_of(args.model[0]), args.rows[0], device).call, args.loop)
        return
    bandwidth = read_bandwidth(device)
    results = []
    for model in args.model:
        for num_rows in args.rows:
            case = case_type(config_of(model), num_rows, device)
            error = case.max_error()
            took, baseline = times(case)
            gbs = case.nbytes * 1e-3 / took["p50"]
            results.append({
                "op": op, "impl": dispatch.select(op, device, torch.bfloat16), "model": model, "rows": num_rows,
                "dtype": "bf16", "us p50": took["p50"], "us p20": took["p20"], "us p80": took["p80"], "GB/s": gbs,
                "share of read bandwidth": gbs / bandwidth, "baseline": case.baseline, "baseline us": baseline,
                "ratio": baseline / took["p50"], "max error": error,
            })  # fmt: skip
            print(*results[-1].values(), flush=True)
    facts = header(device) | {"measured read GB/s": bandwidth}
    report(f"{op}_{device.type}", facts, results, args.out)
