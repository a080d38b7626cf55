"""``orthrus-rt generate``: continues a prompt and shows the text as it is decoded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys

from orthrus_rt import prompts
from orthrus_rt.cli_options import (
    EXIT_DIFFERENT,
    add_model_options,
    check_length,
    check_used,
    load_engine,
    read_utf8,
    require_sampling,
    say,
    tokens_text,
)
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.outputs import GenerationOutput
from orthrus_rt.sampling import SamplingParams
from orthrus_rt.terminal import Screen, table
from orthrus_rt.text_stream import TextStream


def add_parser(commands) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    parser.set_defaults(run=run)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", help="the prompt; without it and --file, or for -, standard input")
    source.add_argument("--file", metavar="PATH", help="read the prompt from a file")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", dest="chat", action="store_true", default=None, help="one user turn of the chat template"
    )
    form.add_argument(
        "--raw", dest="chat", action="store_false", help="continue the text (default: --chat if there is a template)"
    )
    add_model_options(parser, engine=True)
    parser.add_argument("--mode", choices=("auto", *MODES), default="auto", help="how to decode")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0 keeps all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of mass P")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P x the likeliest")
    for name, neutral, help in (
        ("repetition", 1.0, "divide logits of tokens in prompt or output by X; 1 is off"),
        ("presence", 0.0, "subtract X from logits of tokens in the output"),
        ("frequency", 0.0, "subtract X for each time that a token is in the output"),
    ):
        sampling.add_argument(f"--{name}-penalty", type=float, default=neutral, metavar="X", help=help)
    sampling.add_argument(
        "--logit-bias", type=_token_bias, action="append", default=[], metavar="ID=X", help="add X to a token's logit"
    )
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="N", help="do not stop before N tokens")
    sampling.add_argument("--seed", type=int, help="default: drawn, and reported with --stats or --json")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's or a chat's end ids")
    parser.add_argument("--stats", action="store_true", help="print a table of rates after the text")
    parser.add_argument("--compare-ar", action="store_true", help="decode again in ar mode; exit 1 if a token differs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the text")


def _token_bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=X, got {text!r}") from None


def _read_prompt(args) -> str:
    if args.prompt not in (None, "-"):
        text = read_utf8("argument", lambda: args.prompt)
    elif args.file is not None:
        with open(args.file, encoding="utf-8", newline="") as file:  # line ends unchanged, as from standard input
            text = read_utf8(args.file, file.read)
    elif sys.stdin is None or sys.stdin.isatty():  # None: closed
        raise ValueError("a prompt is needed: as an argument, from --file, or on standard input")
    else:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the locale says
        text = read_utf8("standard input", sys.stdin.read)
    if not text:
        raise ValueError("the prompt is empty")
    return text


def run(args) -> int:
    check_used(args, "--mode", [args.mode])
    text = _read_prompt(args)
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        min_p=args.min_p, seed=args.seed, ignore_eos=args.ignore_eos, repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty, frequency_penalty=args.frequency_penalty,
        logit_bias=tuple(args.logit_bias), min_tokens=args.min_tokens,
    )  # fmt: skip
    for name in ("top_k", "top_p", "min_p", "seed"):
        if getattr(params, name) != getattr(SamplingParams, name):
            require_sampling(f"--{name.replace('_', '-')}", params)
    engine = load_engine(args, args.mode)
    chat = bool(engine.tokenizer.chat_template) if args.chat is None else args.chat
    prompt_ids, end = prompts.encode(engine.tokenizer, text, chat=chat), engine.tokenizer.eos_token_id
    if chat and end is not None and end < engine.config.vocab_size and not args.ignore_eos:
        params = dataclasses.replace(params, stop_token_ids=(end,))  # it ends a turn: config.json need not name it
    check_length(prompt_ids, engine, "the prompt")
    if args.compare_ar:
        _warm_up(engine, prompt_ids)
    output, decoded = _decode(engine, prompt_ids, params, show=not args.json)
    other = None
    if args.compare_ar:
        same_seed = dataclasses.replace(params, seed=output.stats.seed)
        other = engine.generate(prompt_ids, same_seed, mode="ar")
    if args.json:
        print(json.dumps(_facts(args, engine, prompt_ids, output, decoded, other)))
    else:
        if args.stats or other:
            print("\n" + _stats_table(engine, [(args.mode, output), *([("ar", other)] if other else [])]))
            print(_footer(args, engine, output))
        if other:
            print(f"identical tokens: {_verdict(engine, output, other)}")
    if output.finish_reason == "length" and len(output.token_ids) < args.max_new_tokens:
        say(args, f"cut at --max-seq-len {engine.max_seq_len}, after {len(output.token_ids)} new tokens")
    elif output.finish_reason == "length" and chat and not args.ignore_eos:  # an answer has an end of its own
        say(args, f"cut at --max-new-tokens {args.max_new_tokens}")
    return EXIT_DIFFERENT if other and other.token_ids != output.token_ids else 0


def _warm_up(engine, prompt_ids) -> None:
    """Decode a few tokens in both modes, so that neither rate includes first-use costs."""
    for mode in (None, "ar"):
        engine.generate(prompt_ids, SamplingParams(max_new_tokens=4, ignore_eos=True), mode=mode)


def _decode(engine, prompt_ids, params, *, show: bool):
    """Generate, writing the text as it is decoded if ``show``. Returns ``(GenerationOutput, text)``."""
    tokens, text = [], []
    stream = TextStream(engine.tokenizer)
    pieces = engine.stream(prompt_ids, params)
    with Screen() as screen, contextlib.closing(pieces):
        try:
            for piece in pieces:
                tokens += piece.token_ids
                text.append(stream.push(piece.token_ids))
                if show:
                    screen.write(text[-1])
                    screen.status(_progress(piece.stats))
            text.append(stream.end())
            if show:
                screen.write(text[-1])
        finally:
            if show and tokens:
                screen.write("\n")
    return GenerationOutput(tokens, piece.finish_reason, piece.stats), "".join(text)


def _progress(s) -> str:
    return f"{s.mode}  {s.tokens} tokens  {s.tokens_per_cycle:.2f} tokens/cycle  {s.tokens_per_second:.1f} tok/s"


def _stats_table(engine, outputs) -> str:
    """A row per ``(requested mode, output)``, and below them the cycles of each plan that ``auto`` ran."""
    rows = [("mode", "block length", "tokens", "cycles", "passes", "tokens/cycle", "tokens/pass", "tok/s")]
    plans = []
    for mode, s in ((mode, output.stats) for mode, output in outputs):
        block_len = str(s.block_len)
        if mode == "auto":
            block_len = f"up to {engine.make_plan(mode).block_len}"
            plans.append("cycles of auto: " + (", ".join(f"{plan} {n}" for plan, n in s.plans.items()) or "none"))
        rates = (f"{s.tokens_per_cycle:.2f}", f"{s.tokens_per_pass:.2f}", f"{s.tokens_per_second:.1f}")
        rows.append((mode, block_len, str(s.tokens), str(s.cycles), str(s.passes), *rates))
    return "\n".join([table(rows), *plans])


def _footer(args, engine, output) -> str:
    from orthrus_rt import dispatch, info

    device, s = info.device_facts(engine.device), output.stats
    impl = dispatch.select("row_linear", engine.device, engine.model.dtype)
    where = f"{device['name']}, {device['isa'] if impl == 'cpu' else impl}"
    facts = [args.model, where, args.dtype, f"prompt {s.prompt_tokens} tokens in {s.prefill_seconds:.2f} s"]
    if s.seed is not None:
        facts.append(f"seed {s.seed}")
    return ", ".join([*facts, f"finished: {output.finish_reason}"])


def _verdict(engine, output, other) -> str:
    from orthrus_rt.verify import first_difference

    difference = first_difference(output.token_ids, other.token_ids)
    if difference is None:
        return f"yes ({len(output.token_ids)} of {len(output.token_ids)})"
    return f"no, first difference at token {difference.index}: {tokens_text(engine.tokenizer, difference.tokens)}"


def _stats_facts(stats) -> dict:
    names = ("tokens_per_cycle", "tokens_per_pass", "tokens_per_second")
    return dataclasses.asdict(stats) | {name: getattr(stats, name) for name in names}


def _facts(args, engine, prompt_ids, output, text, other) -> dict:
    facts = {
        "model": args.model,
        "device": str(engine.device),
        "dtype": args.dtype,
        "mode": args.mode,
        "prompt_token_ids": prompt_ids,
        "token_ids": output.token_ids,
        "text": text,
        "finish_reason": output.finish_reason,
        "stats": _stats_facts(output.stats),
    }
    if other:
        facts["ar"] = {"token_ids": other.token_ids, "stats": _stats_facts(other.stats)}
        facts["identical_tokens"] = other.token_ids == output.token_ids
    return facts
