"""Shared by the rows of bench_decode: a model on a device, its engines, floor and columns."""

from __future__ import annotations

import time
from unittest import mock

import torch

from bench import common
from bench.acceptance import mean_accepted, one_pass_trace, per_position, trace
from bench.models import random_checkpoint
from orthrus_rt import checkpoint as ckpt
from orthrus_rt import prompts, room
from orthrus_rt.coded_blocks import CODED_BITS, DRAFT_BITS
from orthrus_rt.cycle_plan import CyclePlan, cycle_plan
from orthrus_rt.engine import Engine
from orthrus_rt.model import Model
from orthrus_rt.timing import SLEEP_CYCLES

# Drafts that the published models accept per cycle, of 31 (twice their tokens per forward pass, less the bonus token).
PUBLISHED = {"1.7b": 7.5, "4b": 9.4, "8b": 9.7, "tiny": 3.0}
# For the embedded model over 50 prompts with 15 drafts (bench/results/cpu-zen4/hypotheses.md): by number of blocks, the
# share of one_pass cycles in which a block comes true, and how many of its drafts are accepted, as a share of
# two_pass's.
HIT_RATES, ONE_PASS_SHARE = {1: 0.60, 2: 0.76, 4: 0.86, 6: 0.90, 8: 0.93, 12: 0.96}, 2 / 3
WARM_UP = 4  # cycles
BUSY_S = 0.2  # idle clocks are several times slower and take some tens of ms to rise
MANY = 1 << 30


class Bench:
    """One model on one device, and what its rows have in common."""

    max_seq_len = 2048  # of the embedded model's engines

    def __init__(self, args):
        self.args, self.device = args, args.device
        self.dtype = torch.bfloat16
        self.real = args.model == common.EMBEDDED_NAME
        if self.real:
            self.checkpoint = ckpt.load(common.EMBEDDED_NAME)
        else:
            self.checkpoint = random_checkpoint(args.model, self.device, args.block_len)
        self.config = self.checkpoint.config
        self.cases = args.kinds if self.real else args.context
        self.draft_len = self.config.block_len - 1 if args.draft_len is None else args.draft_len
        self.accepted = args.accepted
        if self.accepted is None and not self.real:
            self.accepted = mean_accepted(per_position(PUBLISHED[args.model], 31), self.draft_len)
        if not self.real:
            per_position(self.accepted, self.draft_len)  # checks it
        self.bandwidth = common.read_bandwidth(self.device)
        self.cycles = WARM_UP + args.cycles  # of a row, or of a profiled baseline
        self.model = None
        if self.positions() > (most := self.config.most_positions):
            raise ValueError(f"--context: {self.positions()} positions are needed, and the model has {most}")

    @property
    def profiles(self) -> bool:
        """Whether there are kernels that the profiler can time."""
        return self.device.type == "cuda"

    def trace(self, mode: str, batch: int) -> torch.Tensor:
        """Accepted drafts of every measured cycle and sequence, ``[cycles, batch]``; repeated for further cycles."""
        if mode == "ar":
            return torch.zeros(1, batch, dtype=torch.int32)
        if mode == "one_pass":
            mean = ONE_PASS_SHARE * self.accepted
            return one_pass_trace(mean, self.draft_len, self.hit_rate, self.args.cycles, batch)
        return trace(self.accepted, self.draft_len, self.args.cycles, batch)

    @property
    def hit_rate(self) -> float:
        """Share of one_pass cycles in which a block comes true."""
        fan_out = self.plan("one_pass").fan_out
        known = max((f for f in HIT_RATES if f <= fan_out), default=1)
        return HIT_RATES[known] if self.args.hit_rate is None else self.args.hit_rate

    def plan(self, mode: str) -> CyclePlan:
        on_cpu = self.args.device.type == "cpu"
        return cycle_plan(mode, self.draft_len, self.args.fan_out, self.config, on_cpu=on_cpu)

    def room(self, context: int, mode: str, batch: int) -> int:
        """Positions of a sequence that starts at ``context`` and never ends while it is measured."""
        accepted = self.trace(mode, batch)
        grown = 1 + accepted[torch.arange(self.cycles) % len(accepted)]
        return context + int(grown.sum(0).max()) + 4 * (self.draft_len + 1)

    def positions(self) -> int:
        """The most positions that any row needs."""
        cases = ((max(self.args.context), mode, max(self.args.batch)) for mode in self.args.modes)
        return self.max_seq_len if self.real else max(self.room(*case) for case in cases)

    def engine(self, mode: str, batch: int, max_seq_len: int) -> Engine:
        """An engine whose weights are shared by all engines of this call."""

        def shared(checkpoint, **kwargs):
            if self.model is None:
                self.model = Model(checkpoint, **kwargs | {"max_seq_len": self.positions()})
            return self.model

        with mock.patch("orthrus_rt.engine.Model", shared):
            return Engine(
                self.checkpoint, device=self.device, dtype=self.dtype, mode=mode, max_seq_len=max_seq_len,
                draft_len=self.draft_len, fan_out=self.args.fan_out, max_batch_size=batch, num_pages=None,
                prefix_caching=False,
            )  # fmt: skip

    def begin(self) -> None:
        """Prepare for timing: on a GPU, complete all earlier work and raise the clocks to those of a busy device."""
        self.sync()
        if self.device.type == "cuda":
            end = time.perf_counter() + BUSY_S
            while time.perf_counter() < end:
                torch.cuda._sleep(SLEEP_CYCLES)
                self.sync()

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def floor_ms(self, mode: str, batch: int, context: float, coded: bool) -> float:
        """Time to read each pass's weights and every sequence's cache once. In bf16 or, if ``coded``, in 12 bits, and
        in 8 what serves only drafts: all that a pass without AR rows reads, and the diffusion view's own weights.
        """
        c = self.config
        cache = 2 * batch * context * c.num_layers * c.num_heads_kv * c.head_dim * 2
        exact, draft = (CODED_BITS / 16, DRAFT_BITS / 16) if coded else (1, 1)
        ar = exact * self.weight_bytes(("",))
        drafting = {
            "ar": 0,
            "two_pass": draft * self.weight_bytes(("_diff",)) + cache,
            "one_pass": draft * (self.weight_bytes(("", "_diff")) - self.weight_bytes(("",))),
        }
        return (ar + cache + drafting[mode]) / self.bandwidth * 1e-6

    def weight_bytes(self, views: tuple[str, ...]) -> int:
        """bf16 bytes of the matrices that a pass with rows of these views reads, the head included."""
        head = ckpt.head_name(self.config)
        total = 0
        for name, shape in ckpt.expected_tensors(self.config).items():
            attention = "self_attn" in name
            view = "_diff" if name.endswith("_diff.weight") else ""
            mine = view in views if attention else "mlp" in name or name == head
            total += 2 * shape[0] * shape[1] if mine and len(shape) == 2 else 0
        return total

    def row(self, runtime, mode, batch, context, cycle_s, tokens_per_cycle, *, grown=0.0, **more) -> dict:
        """``cycle_s``: seconds per cycle of the whole batch; ``tokens_per_cycle``: of one sequence, whose cache was
        ``grown`` tokens longer than ``context`` on average.
        """
        coded = runtime == "orthrus_rt" and room.are_coded(self.device, self.dtype)
        floor = self.floor_ms(mode, batch, context + grown, coded)
        acceptance = {"ar": "none (ar)"}
        if mode != "ar" and self.real:
            acceptance[mode] = "real"
        elif mode == "two_pass":
            acceptance[mode] = f"simulated acceptance a={self.accepted:.3g}"
        elif mode == "one_pass":
            mean = f"a={ONE_PASS_SHARE * self.accepted:.3g}"
            acceptance[mode] = f"simulated acceptance {mean} where a block came true, {self.hit_rate:.0%}"
        plan = self.plan(mode)
        return {
            "model": self.args.model,
            "runtime": runtime,
            "mode": mode,
            "block_len": plan.block_len,
            "fan_out": plan.fan_out,
            "batch": batch,
            "context": round(context),
            "acceptance": acceptance[mode],
            "tokens_per_cycle": tokens_per_cycle,
            "ms_per_cycle": cycle_s * 1e3,
            "floor_ms": floor,
            "of_floor": floor / (cycle_s * 1e3),
            "tok_s": batch * tokens_per_cycle / cycle_s,
        } | more


def peak_gb(bench: Bench, engine: Engine | None = None) -> dict:
    """Peak device memory since the last call; on the CPU the memory that the engine planned."""
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() * 1e-9
        torch.cuda.reset_peak_memory_stats()
        return {"peak_gb": peak}
    return {"peak_gb": engine.memory_report()["total"] * 1e-9} if engine else {}


def prompts_of(bench: Bench, kind: str) -> list[list[int]]:
    tokenizer = bench.checkpoint.load_tokenizer()
    return [p.encode(tokenizer) for p in prompts.load(kind)[: bench.args.num_prompts]]


def case_of(row: dict):
    """The requested case: batch, and the kind of prompts (embedded model) or the context (other models)."""
    return row["batch"], row.get("kind", row["context"])
