"""Time to first token of requests with a common beginning, with and without prefix caching, on the embedded model.

``one by one``: each request arrives when the one before has ended. ``at once``: all arrive together, and the time is
until the last of them has its first token. Every round has a new beginning, which no earlier request had. Tokens with
and without caching are checked to be the same.

    python -m bench.bench_prefix --out DIR
"""

from __future__ import annotations

import time

from bench import common
from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams

FIRST = SamplingParams(max_new_tokens=1)


def requests(engine: Engine, shared: int, count: int, round_number: int) -> list[list[int]]:
    """``count`` prompts with the same first ``shared`` tokens, which differ from those of other rounds."""
    beginning = engine.tokenizer(f"{round_number}. " + " ".join(p.text for p in prompts.load("long")) * 2).input_ids
    if shared > len(beginning):
        raise ValueError(f"--shared must be at most {len(beginning)}, got {shared}")
    return [beginning[:shared] + engine.tokenizer("\n" + p.text).input_ids for p in prompts.load("chat")[:count]]


def one_by_one(engine: Engine, ids: list[list[int]]) -> tuple[list[float], list]:
    seconds, outs = [], []
    for prompt in ids:
        start = time.perf_counter()
        outs.append(engine.generate(prompt, FIRST, mode="ar"))
        seconds.append(time.perf_counter() - start)
    return seconds[1:], outs


def at_once(engine: Engine, ids: list[list[int]]) -> tuple[list[float], list]:
    start = time.perf_counter()
    outs = engine.generate(ids, FIRST, mode="ar")
    return [time.perf_counter() - start], outs


def main() -> None:
    parser = common.parser_of(__doc__, device="cpu")
    parser.add_argument("--shared", type=int, nargs="+", default=[256, 1000])
    parser.add_argument("--requests", type=int, default=8, choices=range(2, 13), metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for shared in args.shared:
        for name, run in (("one by one", one_by_one), ("at once", at_once)):
            tokens = {}
            for caching in (False, True):
                options = dict(max_batch_size=args.requests, prefix_caching=caching)
                engine = common.embedded_engine(args.device, "ar", **options)
                for n in (-2, -1):  # warms caches and graphs
                    run(engine, requests(engine, shared, args.requests, n))
                seconds, outs = [], []
                for n in range(args.rounds):
                    times, some = run(engine, requests(engine, shared, args.requests, n))
                    seconds += times
                    outs += some
                engine.close()
                tokens[caching] = [out.token_ids for out in outs]
                ms = common.percentiles([1e3 * s for s in seconds])
                rows.append(
                    {
                        "arrival": name,
                        "shared": shared,
                        "requests": args.requests,
                        "prefix_caching": caching,
                        "prompt_tokens": sum(o.stats.prompt_tokens for o in outs) / len(outs),
                        "cached_tokens": sum(o.stats.cached_tokens for o in outs) / len(outs),
                        "first_token_ms": ms["p50"],
                        "p20": ms["p20"],
                        "p80": ms["p80"],
                    }
                )
                print(rows[-1], flush=True)
            assert tokens[False] == tokens[True]
    facts = {"model": common.EMBEDDED_NAME, "mode": "ar", "rounds": args.rounds}
    common.report("prefix", common.header(args.device) | facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
