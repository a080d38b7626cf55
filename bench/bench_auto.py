"""``mode="auto"`` beside every fixed plan, on the embedded model: tokens per second by batch size and kind of text.

Every plan decodes the same requests, prefill included, by the clock, until there are tokens for four requests per slot:
slots are refilled as on a server, and the queue does not run dry. (A queue decoded to its end would measure how well
each plan happens to fill the slots with the last requests.) Lengths are drawn: were there few of them, a plan that
keeps its sequences in step would see many end at once, and read the weights once for all that follow. ``auto first`` is
a fresh policy with measured costs, its learning included; ``auto`` is one that has decoded those texts before. Rounds
are interleaved, each in another order, so that a machine whose speed changes is fair to all, and each begins with
another text, as a fresh policy depends on whether the first few drafts of all happen to be accepted. Of rates, and of
their ratios within a round, the median counts, and ``p20`` and ``p80`` tell the noise, that of the texts included.
``over_best_fixed`` compares with the plan that was fastest in these rounds, which it owes to luck in part,
``over_chosen_fixed`` with the one that was fastest in all rounds but the one compared, which need not be the best: what
is true lies in between. ``adversarial`` decodes code with a drafter that is broken on purpose.

    python -m bench.bench_auto --out DIR
"""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
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
LENGTHS = 0.5, 1.5  # least and most of a request, of --tokens
NEXT_ROUND = 5  # texts further on the next round begins; no divisor of their number, so that each has its turn


class Decoded(NamedTuple):
    """What came of some requests."""

    seconds: float
    tokens: list[list[int]]


class Broken(Mapping):
    """A checkpoint's tensors with the diffusion view's output turned round."""

    def __init__(self, tensors: Mapping):
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return -self._tensors[name] if "o_proj_diff" in name else self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def make_engine(kind: str, batch: int, device: torch.device) -> Engine:
    loaded = checkpoint.load("smollm2-135m")
    if kind == "adversarial":
        loaded = replace(loaded, tensors=Broken(loaded.tensors))
    return Engine(
        loaded, device=device, dtype=torch.bfloat16, mode="auto", max_seq_len=1024, draft_len=None, fan_out=None,
        max_batch_size=batch, num_pages=None, prefix_caching=False,
    )  # fmt: skip


def fixed_plans(batch: int, most_rows: int) -> list[CyclePlan]:
    """AR, and of auto's candidates those with no more than ``most_rows`` rows in a pass."""
    return [plan for plan in candidate_plans(16) if plan == AR or batch * plan.max_rows <= most_rows]


def decode(engine: Engine, ids: list[list[int]], tokens: int, most: int, plan: CyclePlan | None) -> Decoded:
    """Requests of ``tokens`` on average until ``most`` tokens are there, or all; ``plan`` None is auto."""
    options = {}
    if plan is not None:
        options = dict(mode=plan.mode, draft_len=max(1, plan.block_len - 1), fan_out=plan.fan_out or None)
    asked, requests, drawn = engine.make_plan(**options), [], random.Random(0)
    for prompt in ids:
        length = round(drawn.uniform(*LENGTHS) * tokens)
        requests.append(engine._make_request(prompt, SamplingParams(max_new_tokens=length, ignore_eos=True), asked))
    start = time.perf_counter()
    with contextlib.closing(engine._run(requests, asked)) as rounds:
        for _ in rounds:
            if sum(len(r.tokens) for r in requests) >= most:
                break
        seconds = time.perf_counter() - start
    if failed := [r for r in requests if r.error]:
        raise SystemExit(f"bench_auto: {failed[0].error}")
    return Decoded(seconds, [r.tokens for r in requests])


def decode_first(engine: Engine, *args) -> Decoded:
    """The same by a policy that knows the costs and nothing else."""
    fresh = copy.copy(engine._autos)
    fresh.clear()
    with mock.patch.object(engine, "_autos", fresh):
        return decode(engine, *args, None)


def fastest(rates: dict[str, list[float]], but: int | None = None) -> str:
    """The plan whose median rate is best, of all rounds or all but one."""

    def median(label: str) -> float:
        return statistics.median([r for i, r in enumerate(rates[label]) if i != but] or rates[label])

    return max(rates, key=median)


def measure(kind: str, batch: int, args) -> list[dict]:
    engine = make_engine(kind, batch, args.device)
    texts = [p.encode(engine.tokenizer) for p in prompts.load("chat" if kind == "chat" else "code")]
    number = (WAVES + WAITING) * batch
    most = WAVES * batch * args.tokens
    plans = fixed_plans(batch, args.most_rows)
    engine.runner.make_room([(plan, batch) for plan in plans])  # at once: more rows drop what is recorded
    engine.warmup()
    for plan in plans:
        decode(engine, texts[:1] * batch, 4 * plan.block_len, most, plan)  # built, recorded and replayed
    ways = {plan.label: partial(decode, plan=plan) for plan in plans}
    ways |= {"auto first": decode_first, "auto": partial(decode, plan=None)}
    longest = SamplingParams(max_new_tokens=round(LENGTHS[1] * args.tokens), ignore_eos=True)
    want = [output.token_ids for output in engine.generate(texts, longest)]
    decode(engine, [texts[i % len(texts)] for i in range(number)], args.tokens, most, None)  # slots refilled too
    rates: dict[str, list[float]] = {label: [] for label in ways}
    cycles = {label: Counter() for label in ways}
    order = deque(ways)
    for start in range(0, NEXT_ROUND * args.rounds, NEXT_ROUND):
        queue = [i % len(texts) for i in range(start, start + number)]
        for label in order:
            before = Counter(engine.metrics.plans)
            got = ways[label](engine, [texts[i] for i in queue], args.tokens, most)
            if any(want[i][: len(some)] != some for i, some in zip(queue, got.tokens, strict=True)):
                raise SystemExit(f"bench_auto: {label} gave other tokens than auto before")
            rates[label].append(sum(map(len, got.tokens)) / got.seconds)
            cycles[label] += Counter(engine.metrics.plans) - before
        order.rotate()
    engine.close()
    rows, fixed = [], {plan.label: rates[plan.label] for plan in plans}
    others = {
        "over_ar": fixed[AR.label],
        "over_best_fixed": fixed[fastest(fixed)],
        "over_chosen_fixed": [fixed[fastest(fixed, but=i)][i] for i in range(args.rounds)],
    }
    for label in ways:
        rate = common.percentiles(rates[label])
        rows.append({"kind": kind, "batch": batch, "plan": label, "tok_s": rate["p50"]})
        rows[-1] |= {"p20": rate["p20"], "p80": rate["p80"]}
        for column, other in others.items():
            rows[-1][column] = statistics.median(a / b for a, b in zip(rates[label], other, strict=True))
        rows[-1]["cycles"] = " ".join(f"{plan}:{n}" for plan, n in cycles[label].items())
    return rows


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, least=2, most=600, default=128, help="of a request, on average")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--most-rows", type=int, default=32, help="leave out fixed plans with more rows in a pass")
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        for batch in args.batch:
            rows += measure(kind, batch, args)
            print(*rows[-len(fixed_plans(batch, args.most_rows)) - 2 :], sep="\n", flush=True)
    facts = common.header(args.device) | {"tokens": args.tokens, "rounds": args.rounds}
    common.report(f"auto-{args.device.type}", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
