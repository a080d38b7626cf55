"""Requests that arrive at random times, as on a server: throughput, and how long each request waits.

The embedded model behind an AsyncEngine; ``rate`` requests a second arrive by a Poisson process, code and chat prompts
alternating, with random lengths, the same for every mode. ``tok_s``: tokens of all requests per second, from the first
arrival to the last token. ``ttft``: from a request's arrival to its first token, including its time in the queue.
``tpot``: from there to its last token, per token. All are medians over rounds, each of which runs the modes in another
order, as is ``over_first``, the throughput's ratio to that of the first mode in the same round. ``recording_s``:
seconds spent on recording cycles. On a GPU, where a recording takes as long as many cycles, all requests run once
before they count. Every mode must give the same tokens, whichever requests ran together.

    python -m bench.bench_serving --out DIR
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

from bench import common
from orthrus_rt import prompts
from orthrus_rt.aio import AsyncEngine
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.sampling import SamplingParams

LENGTHS = 0.5, 1.5  # shortest and longest request, as shares of --tokens


@dataclass
class Asked:
    """A request and its results; times in seconds from the start."""

    at: float
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    first = last = 0.0


@dataclass
class Served:
    asked: list[Asked]
    recording_s: float
    accepted: float | None  # share of drafts

    @property
    def tok_s(self) -> float:
        return sum(len(a.tokens) for a in self.asked) / max(a.last for a in self.asked)


def arrivals(tokenizer, rate: float, args) -> list[Asked]:
    """The requests, the same random ones for every mode."""
    drawn, at, asked = random.Random(0), 0.0, []
    pairs = zip(prompts.load("code"), prompts.load("chat"), strict=False)
    texts = [p.encode(tokenizer) for pair in pairs for p in pair]
    for i in range(args.requests):
        length = round(drawn.uniform(*LENGTHS) * args.tokens)
        asked.append(Asked(at, texts[i % len(texts)], SamplingParams(length, ignore_eos=True)))
        at += drawn.expovariate(rate)
    return asked


async def serve(shared: AsyncEngine, asked: list[Asked]) -> None:
    start = time.perf_counter()

    async def client(one: Asked) -> None:
        await asyncio.sleep(start + one.at - time.perf_counter())
        async for piece in shared.stream(one.prompt, one.params):
            if piece.error:
                raise SystemExit(f"bench_serving: {piece.error}")
            one.last = time.perf_counter() - start
            one.first = one.first or one.last
            one.tokens += piece.new_token_ids

    await asyncio.gather(*map(client, asked))


def run(mode: str, rate: float, args) -> Served:
    """Run one engine, which decodes some requests first and then those that count."""
    options = {"draft_len": args.draft_len} if mode == "two_pass" else {}
    engine = common.embedded_engine(args.device, mode, max_seq_len=1024, max_batch_size=args.batch, **options)
    engine.warmup()

    first, asked = (arrivals(engine.tokenizer, rate, args) for _ in range(2))
    if args.device.type == "cpu":
        first = arrivals(engine.tokenizer, 1e9, args)[: args.batch]

    def recording_s() -> float:
        return engine.metrics.times.get("recording", (0, 0.0))[1]

    async def all_of_it() -> Served:
        async with AsyncEngine(engine) as shared:
            await serve(shared, first)
            before = await shared.call(lambda _: recording_s())
            await serve(shared, asked)
            recorded = await shared.call(lambda _: recording_s()) - before
            return Served(asked, recorded, common.accepted_share(common.drafts(engine)))

    return asyncio.run(all_of_it())


def row(mode: str, rate: float, runs: dict[str, list[Served]], batch: int) -> dict:
    """Medians over rounds."""
    rounds, first = runs[mode], next(iter(runs.values()))
    found = {"mode": mode, "rate": rate, "batch": batch, "requests": len(rounds[0].asked)}
    found["tok_s"] = statistics.median(served.tok_s for served in rounds)
    found["over_first"] = statistics.median(a.tok_s / b.tok_s for a, b in zip(rounds, first, strict=True))
    found["recording_s"] = statistics.median(served.recording_s for served in rounds)
    accepted = [served.accepted for served in rounds]
    found["accepted"] = None if None in accepted else statistics.median(accepted)
    measures = {"ttft": lambda a: a.first - a.at, "tpot": lambda a: (a.last - a.first) / (len(a.tokens) - 1)}
    for name, of in measures.items():
        each = [statistics.quantiles(map(of, served.asked), n=100, method="inclusive") for served in rounds]
        for percent in (50, 90):
            found[f"{name}_p{percent}_ms"] = 1e3 * statistics.median(cuts[percent - 1] for cuts in each)
    return found


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--modes", nargs="+", choices=(*MODES, "auto"), default=["ar", "two_pass", "auto"])
    parser.add_argument("--rate", type=float, nargs="+", default=[2, 6, 12], help="requests a second")
    parser.add_argument("--requests", type=int, least=2, default=40)
    parser.add_argument("--tokens", type=int, least=3, most=600, default=64, help="of a request, on average")
    parser.add_argument("--batch", type=int, default=8, help="slots of the engine")
    parser.add_argument("--draft-len", type=int, default=3, help="of two_pass")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for rate in args.rate:
        runs: dict[str, list[Served]] = {mode: [] for mode in args.modes}
        order = deque(args.modes)
        for _ in range(args.rounds):
            for mode in order:
                runs[mode].append(run(mode, rate, args))
            order.rotate()
        want = [one.tokens for one in runs[args.modes[0]][0].asked]
        if any([one.tokens for one in served.asked] != want for rounds in runs.values() for served in rounds):
            raise SystemExit("bench_serving: two modes gave other tokens")
        rows += [row(mode, rate, runs, args.batch) for mode in runs]
        print(*rows[-len(runs) :], sep="\n", flush=True)
    facts = {"tokens": args.tokens, "draft_len of two_pass": args.draft_len, "rounds": args.rounds}
    common.report(f"serving-{args.device.type}", common.header(args.device) | facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
