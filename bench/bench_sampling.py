"""Tokens per cycle of the two acceptance rules at several temperatures, on the embedded model.

Both rules sample the same distribution and differ in how many drafts survive. Coupled acceptance also gives the text of
plain AR decoding with that seed, which the published rejection rule does not. Temperature 0 is greedy decoding.

    python -m bench.bench_sampling --out DIR
"""

from __future__ import annotations

import statistics

from bench import common
from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams


def cell(engine: Engine, kind: str, temperature: float, acceptance: str, args) -> dict:
    """Token-weighted over all prompts of ``kind`` and all seeds; ``sd`` is the deviation over single generations."""
    outs = []
    for prompt in prompts.load(kind):
        ids = prompt.encode(engine.tokenizer)
        for seed in range(args.seeds if temperature else 1):
            params = SamplingParams(
                max_new_tokens=args.tokens, temperature=temperature, top_p=args.top_p, seed=seed, acceptance=acceptance
            )
            outs.append(engine.generate(ids, params, mode="two_pass", draft_len=args.draft_len))
    cycles = sum(o.stats.cycles for o in outs)
    tokens = sum(o.stats.tokens - 1 for o in outs)
    return {
        "kind": kind,
        "temperature": temperature,
        "acceptance": acceptance if temperature else "greedy",
        "n": len(outs),
        "tokens": tokens,
        "tokens_per_cycle": tokens / cycles,
        "sd": statistics.stdev(o.stats.tokens_per_cycle for o in outs),
    }


def main() -> None:
    parser = common.parser_of(__doc__, device="cpu")
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat"])
    parser.add_argument("--temperatures", type=float, least=0, nargs="+", default=[0.0, 0.3, 0.7, 1.0])
    parser.add_argument("--tokens", type=int, least=2, most=common.MOST_TOKENS, default=64)
    parser.add_argument("--seeds", type=int, default=2, help="generations per prompt")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--draft-len", type=int, default=15)
    args = parser.parse_args()
    engine = common.embedded_engine(args.device, "two_pass")
    rows = []
    for kind in args.kinds:
        for temperature in args.temperatures:
            for acceptance in ("coupled", "rejection") if temperature else ("coupled",):
                rows.append(cell(engine, kind, temperature, acceptance, args))
                print(rows[-1], flush=True)
    facts = {
        "model": common.EMBEDDED_NAME,
        "mode": "two_pass",
        "draft_len": args.draft_len,
        "max_new_tokens": args.tokens,
        "top_p": args.top_p,
    }
    common.report("sampling", common.header(args.device) | facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
