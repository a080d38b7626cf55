"""Tokens per pass, milliseconds per pass and tokens per second of every mode, with the embedded model's own acceptance.

Decoding alone, without prefill. Each prompt runs through all modes before the next one, so that a temporary slowdown of
the machine affects all modes. Tokens per pass are tokens per read of the weights, which determines the speed where
memory is the bound; on a CPU rows also cost compute.

    python -m bench.bench_one_pass --out DIR
"""

from __future__ import annotations

from bench import common
from orthrus_rt import prompts
from orthrus_rt.cycle_plan import CyclePlan, cycle_plan, most_hypotheses
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams


def plans(config, draft_lens: list[int], fan_outs: list[int]) -> list[CyclePlan]:
    """``ar``, then per draft length ``two_pass`` and ``one_pass`` with each fan-out (0: every hypothesis)."""
    found = [cycle_plan("ar", 1, None, config)]
    for draft_len in draft_lens:
        found.append(cycle_plan("two_pass", draft_len, None, config))
        for fan_out in fan_outs:
            found.append(cycle_plan("one_pass", draft_len, fan_out or most_hypotheses(draft_len), config))
    return found


def run(engine: Engine, ids: list[list[int]], params: SamplingParams, chosen: list[CyclePlan]) -> list[list]:
    """The outputs of each plan; each prompt runs through all plans before the next one."""

    def decode(plan, prompt, params):
        draft_len = plan.block_len - 1 if plan.mode != "ar" else None
        return engine.generate(prompt, params, mode=plan.mode, draft_len=draft_len, fan_out=plan.fan_out or None)

    # Most rows first, as a need for more rows later would drop what is recorded.
    for plan in sorted(chosen, key=lambda plan: -plan.max_rows):
        decode(plan, ids[0], SamplingParams(max_new_tokens=4 * plan.block_len, ignore_eos=True))
    return list(zip(*([decode(plan, prompt, params) for plan in chosen] for prompt in ids), strict=True))


def rates(plan: CyclePlan, outputs: list) -> dict:
    tokens, passes, cycles, seconds, misses = (
        sum(getattr(out.stats, name) for out in outputs) for name in ("tokens", "passes", "cycles", "seconds", "misses")
    )
    tokens -= len(outputs)  # the first tokens come from prefills
    return {
        "mode": plan.mode, "block_len": plan.block_len, "fan_out": plan.fan_out, "rows": plan.max_rows,
        "tokens_per_pass": tokens / passes, "misses": misses / cycles, "ms_per_pass": seconds / passes * 1e3,
        "tok_s": tokens / seconds,
    }  # fmt: skip


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--kinds", nargs="+", choices=prompts.KINDS, default=["code", "chat"])
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, least=2, most=common.MOST_TOKENS, default=64)
    parser.add_argument("--draft-len", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--fan-out", type=int, least=0, nargs="+", default=[1, 2, 4, 8, 0], help="0: every hypothesis")
    args = parser.parse_args()
    engine = common.embedded_engine(args.device)
    rows, same = [], True
    for kind in args.kinds:
        ids = [p.encode(engine.tokenizer) for p in prompts.load(kind)[: args.num_prompts]]
        chosen = plans(engine.config, args.draft_len, args.fan_out)
        outputs = run(engine, ids, SamplingParams(max_new_tokens=args.tokens), chosen)
        tokens = [[out.token_ids for out in outs] for outs in outputs]
        same &= all(t == tokens[0] for t in tokens)
        for plan, outs in zip(chosen, outputs, strict=True):
            rows.append({"prompts": kind, "n": len(ids)} | rates(plan, outs))
            print(rows[-1], flush=True)
    facts = common.header(engine.device) | {"identical_tokens_in_all_modes": same}
    common.report(f"one_pass-{engine.device.type}", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
