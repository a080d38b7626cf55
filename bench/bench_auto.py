"""``mode="auto"`` compared with every fixed plan, on the embedded model: tokens per second by batch size and text.

Every plan decodes the same requests, prefill included, by wall time, until there are tokens for four requests per slot.
Slots are refilled as on a server, and the queue does not run dry. (A queue decoded to its end would measure how well
each plan happens to fill the slots with the last requests.) Lengths are random. If there were only a few lengths, a
plan that keeps its sequences in step would see many end at once, and prefill their successors with one read of the
weights. ``auto first`` is a fresh policy with measured costs, including its learning; ``auto`` is a policy that has
decoded those texts before.

A few rounds of all fixed plans show which is the fastest. This plan, AR and ``auto`` are then compared in further
rounds, from which ``over_ar`` and ``over_best_fixed`` are computed. As the plan was chosen before them, it does not owe
its place to luck in the rounds that count. The speeds of a machine's memory and arithmetic may change within seconds.
So on a CPU the compared plans decode at the same time, each in an engine of its own: the one with the fewest tokens
takes the next step, and every step is timed. A GPU has room for one engine, and there a round is a few runs in a row.
Each plan in turn comes first in a round, in forward and backward order. Each round begins with another text, as a fresh
policy depends on whether its very first drafts happen to be accepted. Rates, and their ratios within a round, are
medians; ``noise`` is the standard error of ``over_ar``, as a share. ``adversarial`` decodes code with a drafter that is
broken on purpose.

    python -m bench.bench_auto --out DIR
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch

from bench import common
from orthrus_rt import checkpoint, prompts
from orthrus_rt.cycle_plan import AR, CyclePlan
from orthrus_rt.engine import Engine
from orthrus_rt.policy import candidate_plans
from orthrus_rt.sampling import SamplingParams

KINDS = ("code", "chat", "adversarial")
WAVES = 4  # requests' worth of tokens per slot
WAITING = 2  # requests per slot beyond these
LENGTHS = 0.5, 1.5  # shortest and longest request, as shares of --tokens
QUANTILE_80 = 0.8416  # of the normal distribution, in standard deviations
FEW_RATIOS = 5  # fewer give no estimate of noise
ERROR_OF_MEDIAN = 1.2533  # as a multiple of the mean's
NEXT_ROUND = 5  # by how many texts each round starts later; no divisor of their number, so that each has its turn


class Decoded(NamedTuple):
    """Results of some requests."""

    seconds: float
    tokens: list[list[int]]


class Broken(Mapping):
    """A checkpoint's tensors with the sign of the diffusion view's output reversed."""

    def __init__(self, tensors: Mapping):
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return -self._tensors[name] if "o_proj_diff" in name else self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def make_engine(kind: str, batch: int, device: torch.device) -> Engine:
    loaded = checkpoint.load(common.EMBEDDED_NAME)
    if kind == "adversarial":
        loaded = replace(loaded, tensors=Broken(loaded.tensors))
    return Engine(
        loaded, device=device, dtype=torch.bfloat16, mode="auto", max_seq_len=1024, draft_len=None, fan_out=None,
        max_batch_size=batch, num_pages=None, prefix_caching=False,
    )  # fmt: skip


def fixed_plans(batch: int, most_rows: int) -> list[CyclePlan]:
    """AR, and of auto's candidates those with no more than ``most_rows`` rows in a pass."""
    return [plan for plan in candidate_plans(16) if plan == AR or batch * plan.max_rows <= most_rows]


class Decoding:
    """Requests of ``tokens`` on average, decoded a step at a time.

    Args:
        plan: None is auto.
        fresh: auto with a policy that knows the costs and nothing else.

    Attributes:
        seconds: of all steps.
    """

    def __init__(self, engine: Engine, ids: list[list[int]], tokens: int, plan: CyclePlan | None, fresh: bool = False):
        options = {}
        if plan is not None:
            options = dict(mode=plan.mode, draft_len=max(1, plan.block_len - 1), fan_out=plan.fan_out or None)
        self._engine, self._autos, self.seconds = engine, engine._autos, 0.0
        if fresh:
            engine._autos = copy.copy(engine._autos)
            engine._autos.clear()
        asked, self._requests, drawn = engine.make_plan(**options), [], random.Random(0)
        for prompt in ids:
            params = SamplingParams(max_new_tokens=round(drawn.uniform(*LENGTHS) * tokens), ignore_eos=True)
            self._requests.append(engine._make_request(prompt, params, asked))
        self._steps = engine._run(self._requests, asked)

    @property
    def num_tokens(self) -> int:
        return sum(len(r.tokens) for r in self._requests)

    def step(self) -> bool:
        """Whether there was something left to do."""
        start = time.perf_counter()
        try:
            return next(self._steps, self) is None
        finally:
            self.seconds += time.perf_counter() - start

    def end(self) -> Decoded:
        self._steps.close()
        self._engine._autos = self._autos
        if failed := [r for r in self._requests if r.error]:
            raise SystemExit(f"bench_auto: {failed[0].error}")
        return Decoded(self.seconds, [r.tokens for r in self._requests])


def decode_together(decodings: list[Decoding], most: int) -> list[Decoded]:
    """Decode until each has ``most`` tokens, or has ended; always the one with the fewest tokens takes the next step.
    Equals take turns in the order of the list.
    """
    running = list(decodings)
    while running:
        next_one = min(running, key=lambda decoding: decoding.num_tokens)
        running.remove(next_one)
        if next_one.step() and next_one.num_tokens < most:
            running.append(next_one)
    return [decoding.end() for decoding in decodings]


def decode(engine: Engine, ids: list[list[int]], tokens: int, most: int, *how, **way) -> Decoded:
    """The same of one :class:`Decoding`, to which ``how`` and ``way`` are passed on."""
    return decode_together([Decoding(engine, ids, tokens, *how, **way)], most)[0]


def fastest(rates: dict[str, list[float]]) -> str:
    """The plan with the best median rate."""
    return max(rates, key=lambda label: statistics.median(rates[label]))


def orders(labels: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: starting at every label in turn, forwards and then backwards."""
    for i in range(rounds):
        first = i // 2 % len(labels)
        turned = labels[first:] + labels[:first]
        yield turned if i % 2 == 0 else turned[::-1]


def noise(ratios: list[float]) -> float | None:
    """Standard error of the ratios' median, as a share of it, from their spread; None if there are too few."""
    if len(ratios) < FEW_RATIOS:
        return None
    spread = common.percentiles(ratios)
    deviation = (spread["p80"] - spread["p20"]) / (2 * QUANTILE_80)
    return ERROR_OF_MEDIAN * deviation / math.sqrt(len(ratios)) / spread["p50"]


def row_of(label: str, rates: dict[str, list[float]], best: str) -> dict:
    """A plan's rate, and its ratios to the rates of AR and of the plan ``best`` in the same rounds."""
    over = {other: [a / b for a, b in zip(rates[label], rates[other], strict=True)] for other in (AR.label, best)}
    rate = common.percentiles(rates[label])
    return {
        "plan": label, "rounds": len(rates[label]), "tok_s": rate["p50"], "p20": rate["p20"], "p80": rate["p80"],
        "over_ar": statistics.median(over[AR.label]), "noise": noise(over[AR.label]),
        "over_best_fixed": statistics.median(over[best]),
    }  # fmt: skip


def prepare(engine: Engine, text: list[int], plans: list[CyclePlan], batch: int) -> None:
    """Build and record all cycles, and time them for auto."""
    engine.runner.make_room([(plan, batch) for plan in plans])  # at once: later growth drops recordings
    engine.warmup()
    for plan in plans:
        decode(engine, [text] * batch, 4 * plan.block_len, 10**9, plan)


def measure(kind: str, batch: int, args) -> list[dict]:
    engine = make_engine(kind, batch, args.device)
    texts = [p.encode(engine.tokenizer) for p in prompts.load("chat" if kind == "chat" else "code")]
    number = (WAVES + WAITING) * batch
    most = WAVES * batch * args.tokens
    plans = fixed_plans(batch, args.most_rows)
    prepare(engine, texts[0], plans, batch)
    ways = {plan.label: dict(plan=plan) for plan in plans}
    ways |= {"auto first": dict(plan=None, fresh=True), "auto": dict(plan=None)}
    longest = SamplingParams(max_new_tokens=round(LENGTHS[1] * args.tokens), ignore_eos=True)
    want = [output.token_ids for output in engine.generate(texts, longest)]
    decode(engine, [texts[i % len(texts)] for i in range(number)], args.tokens, most, None)  # refilled slots too
    cycles, drafts = ({label: Counter() for label in ways} for _ in range(2))

    def run(engines: dict[str, Engine], start: int) -> dict[str, float]:
        """Tokens per second of each, from the text ``start`` on; all together."""
        queue = [i % len(texts) for i in range(start, start + number)]
        before = {label: (Counter(e.metrics.plans), common.drafts(e)) for label, e in engines.items()}
        ids = [texts[i] for i in queue]
        decodings = [Decoding(e, ids, args.tokens, **ways[label]) for label, e in engines.items()]
        rates = {}
        for (label, e), got in zip(engines.items(), decode_together(decodings, most), strict=True):
            if any(want[i][: len(some)] != some for i, some in zip(queue, got.tokens, strict=True)):
                raise SystemExit(f"bench_auto: {label} gave other tokens than auto before")
            cycles[label] += Counter(e.metrics.plans) - before[label][0]
            drafts[label] += common.drafts(e) - before[label][1]
            rates[label] = sum(map(len, got.tokens)) / got.seconds
        return rates

    def meet(engines: dict[str, Engine], rounds: int) -> dict[str, list[float]]:
        rates: dict[str, list[float]] = {label: [] for label in engines}
        apart = len({*engines.values()}) < len(engines)
        for i, order in enumerate(orders(list(engines), rounds)):
            for group in ([label] for label in order) if apart else [order]:
                for label, rate in run({label: engines[label] for label in group}, NEXT_ROUND * i).items():
                    rates[label].append(rate)
        return rates

    fixed = meet({plan.label: engine for plan in plans}, args.fixed_rounds)
    best = fastest(fixed)
    rows = {label: row_of(label, fixed, best) for label in fixed}
    for counted in (*cycles.values(), *drafts.values()):
        counted.clear()
    engines = dict.fromkeys([AR.label, best, "auto first", "auto"], engine)
    if args.device.type == "cpu":
        with mock.patch("orthrus_rt.engine.Model", lambda *_, **__: engine.runner.model):  # all share the weights
            engines |= {label: make_engine(kind, batch, args.device) for label in engines if label != "auto"}
        for other in {*engines.values()} - {engine}:
            prepare(other, texts[0], plans, batch)
    rates = meet(engines, args.rounds)
    for one in {*engines.values()}:
        one.close()
    for label in rates:
        rows[label] = row_of(label, rates, best)
        rows[label]["accepted"] = common.accepted_share(drafts[label])
        rows[label]["cycles"] = " ".join(f"{plan}:{n}" for plan, n in cycles[label].items())
    return [{"kind": kind, "batch": batch} | row for row in rows.values()]


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, least=2, most=600, default=128, help="of a request, on average")
    parser.add_argument("--fixed-rounds", type=int, default=3, help="of all fixed plans")
    parser.add_argument("--rounds", type=int, default=10, help="of the fastest of them, AR and auto")
    parser.add_argument("--most-rows", type=int, default=32, help="leave out fixed plans with more rows in a pass")
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        for batch in args.batch:
            measured = measure(kind, batch, args)
            print(*measured, sep="\n", flush=True)
            rows += measured
    facts = common.header(args.device) | {"tokens": args.tokens}
    common.report(f"auto-{args.device.type}", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
