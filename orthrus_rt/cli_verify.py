"""``orthrus-rt verify``: checks on the user's own machine and checkpoint that the mode and batch change no token."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter

from orthrus_rt import prompts
from orthrus_rt.cli_options import (
    EXIT_DIFFERENT,
    add_model_options,
    check_length,
    check_num_prompts,
    check_used,
    import_torch,
    load_engine,
    read_utf8,
    require_sampling,
    tokens_text,
)
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.sampling import SamplingParams

DESCRIPTION = """Decode prompts in several modes and compare the tokens with those of the first mode alone. Every
difference is reported: its position, both tokens and the gap between their logits. Exits 1 if there is one. With
--against transformers, its greedy generate on the AR part of the checkpoint is compared too: float32 must be equal; in
16 bit, differences that rounding alone explains are listed as near-ties and do not fail. After the first one its model
is given this runtime's tokens, and each of them that it would not have chosen must be a near-tie too."""
SHOWN = 4  # most near-ties printed per prompt and way


def add_parser(commands) -> None:
    parser = commands.add_parser("verify", help="compare modes token by token", description=DESCRIPTION)
    parser.set_defaults(run=run)
    add_model_options(parser, engine=True)
    parser.add_argument(
        "--modes", nargs="+", choices=("auto", *MODES), default=list(MODES), metavar="MODE",
        help=f"of auto, {', '.join(MODES)} (default: all but auto)",
    )  # fmt: skip
    parser.add_argument("--against", choices=("transformers",), help="another implementation, greedy")
    parser.add_argument("--prompts", metavar="PATH", help="one raw prompt a line (default: the built-in prompts)")
    parser.add_argument("-n", "--num-prompts", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="also decode N prompts together in each mode")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, help="seed of sampling (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args) -> int:
    import_torch()
    from orthrus_rt import verify

    check_used(args, "--modes", args.modes)
    todo = _prompts(args)
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed or 0)
    if args.seed is not None:
        require_sampling("--seed", params)
    verify.check(len(todo), params, args.modes, args.batch, args.against)
    engine = load_engine(args, max_batch_size=args.batch)
    ids = [prompt.encode(engine.tokenizer) for prompt in todo]
    for prompt, tokens in zip(todo, ids, strict=True):  # all of them, before the first is decoded
        where, instead = (args.prompts, "") if args.prompts else ("built-in prompt", "; --prompts names others")
        check_length(tokens, engine, f"{where}, {prompt.name}", instead)
    against = _transformers(engine, args.max_new_tokens) if args.against else None
    if not args.json:
        print(
            f"{len(todo)} prompts, at most {args.max_new_tokens} tokens each, in {', '.join(args.modes)}:", flush=True
        )
    results, tokens, verdicts = [], 0, Counter()
    found = verify.verify(engine, ids, params, args.modes, batch=args.batch, against=against)
    for prompt, (want, rate, comparisons) in zip(todo, found, strict=True):
        verdicts[_verdict(comparisons)] += 1
        tokens += sum(c.tokens for c in comparisons)
        if args.json:
            results.append(_facts(prompt.name, args.modes[0], want, rate, comparisons))
        else:
            _print(engine.tokenizer, prompt.name, want, rate, comparisons)
    different, ties = verdicts["differs"], verdicts["near-tie"]
    if args.json:
        facts = {"modes": args.modes, "dtype": args.dtype, "temperature": args.temperature, "tokens_compared": tokens}
        print(json.dumps(facts | {"different": different, "near_ties": ties, "prompts": results}))
    else:
        ways = ", ".join(c.way for c in comparisons)
        how = "greedy" if params.greedy else f"temperature {args.temperature:g}, seed {params.seed}"
        rest = f", {ties} with near-ties within rounding" if ties else ""
        rest += f", {different} differ" if different else ""
        print(f"{args.modes[0]} against {ways} ({args.dtype}, {how}):")
        print(f"{verdicts['identical']} of {len(todo)} prompts identical{rest}, {tokens} tokens compared")
    return EXIT_DIFFERENT if different else 0


def _prompts(args) -> list:
    check_num_prompts(args)
    if args.prompts is None:
        return prompts.load()[: args.num_prompts]
    with open(args.prompts, encoding="utf-8") as file:
        lines = enumerate(read_utf8(args.prompts, file.read).split("\n"), 1)
    found = [prompts.Prompt(f"line {number}", "code", line) for number, line in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts must name a file with a prompt a line, {args.prompts} holds none")
    return found[: args.num_prompts]


def _transformers(engine, max_new_tokens: int):
    from orthrus_rt import transformers_model, verify

    model = transformers_model.build(engine.checkpoint, dtype=engine.model.dtype, device=engine.device)

    def greedy(ids: list[int]) -> list[int]:
        return transformers_model.greedy(model, ids, min(max_new_tokens, engine.max_seq_len - len(ids)))

    return verify.Other("transformers", greedy, functools.partial(transformers_model.logits, model))


def _facts(name, mode, want, rate, comparisons) -> dict:
    ways = [dataclasses.asdict(c) for c in comparisons]
    return {"prompt": name, "mode": mode, "tokens": len(want), "tokens_per_cycle": rate, "ways": ways}


def _verdict(comparisons) -> str:
    """``identical``, ``near-tie`` or ``differs``: the worst of a prompt's comparisons."""
    found = [c.difference for c in comparisons if c.difference]
    if not found:
        return "identical"
    return "near-tie" if all(d.near_tie for d in found) else "differs"


def _print(tokenizer, name, want, rate, comparisons) -> None:
    rates = " / ".join(f"{r:.2f}" for r in (rate, *(c.tokens_per_cycle for c in comparisons)) if r is not None)
    verdict, ties = _verdict(comparisons), sum(len(c.near_ties) for c in comparisons)
    if verdict == "near-tie":
        verdict = f"{ties} near-tie{'s' * (ties > 1)}"
    print(f"{name:24} {len(want):4} tokens  {rates} tokens/cycle  {verdict}", flush=True)
    for c in comparisons:
        for d in c.near_ties[:SHOWN]:
            _print_difference(tokenizer, c.way, "near-tie", d)
        if len(c.near_ties) > SHOWN:
            print(f"  {c.way}: {len(c.near_ties) - SHOWN} more near-ties", flush=True)
        if c.difference and not c.difference.near_tie:
            _print_difference(tokenizer, c.way, "differs", c.difference)


def _print_difference(tokenizer, way, kind, d) -> None:
    gap = "" if d.gap is None else f", logit gap {d.gap:.3g}"
    gap += "" if d.their_gap is None else f", its own {d.their_gap:.3g}"
    print(f"  {way}: {kind} at token {d.index}: {tokens_text(tokenizer, d.tokens)}{gap}", flush=True)
