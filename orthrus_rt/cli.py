"""The ``orthrus-rt`` command. Everything heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import traceback
from importlib import metadata

from orthrus_rt import cli_verify
from orthrus_rt.cli_options import (
    EXIT_DIFFERENT,
    add_model_options,
    check_length,
    check_num_prompts,
    check_used,
    in_options,
    load_engine,
    read_utf8,
    require_sampling,
    tokens_text,
)
from orthrus_rt.cycle_plan import MODES

EXIT_ERROR, EXIT_INTERRUPTED = 2, 128 + signal.SIGINT
BENCH_TOKENS, PROFILE_CONTEXT = 64, 256


def _version() -> str:
    try:
        return metadata.version("orthrus-rt")
    except metadata.PackageNotFoundError:
        return "(from a plain folder)"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthrus-rt",
        description="Lossless dual-view decoding: drafts from a diffusion view, verified by the autoregressive view.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    generate.set_defaults(run=run_generate)
    source = generate.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", help="the prompt; without it and --file, or for -, standard input")
    source.add_argument("--file", metavar="PATH", help="read the prompt from a file")
    form = generate.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", dest="chat", action="store_true", default=None, help="one user turn of the chat template"
    )
    form.add_argument("--raw", dest="chat", action="store_false", help="text to continue (default: --chat if it can)")
    add_model_options(generate, engine=True)
    generate.add_argument("--mode", choices=("auto", *MODES), default="auto", help="how to decode")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    sampling = generate.add_argument_group("sampling")
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
    generate.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end-of-sequence ids")
    generate.add_argument("--stats", action="store_true", help="print a table of rates after the text")
    generate.add_argument(
        "--compare-ar", action="store_true", help="decode again in ar mode; exit 1 if a token differs"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the text")

    info = commands.add_parser(
        "info", help="what runs where", description="Device, implementation per op, model, versions."
    )
    info.set_defaults(run=run_info)
    add_model_options(info, engine=False)
    info.add_argument("--json", action="store_true", help="print one JSON object")

    cli_verify.add_parser(commands)

    bench = commands.add_parser(
        "bench",
        help="how fast a model decodes here, and where a cycle's time goes",
        description="Decode the built-in prompts in each mode; with --profile, time every op of one cycle beside the "
        "bytes it must move.",
    )
    bench.set_defaults(run=run_bench)
    add_model_options(bench, engine=True)
    bench.add_argument(
        "--modes", nargs="+", choices=("auto", *MODES), default=["ar", "two_pass"], metavar="MODE",
        help=f"of auto, {', '.join(MODES)} (default: ar two_pass)",
    )  # fmt: skip
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (default: %(default)s)")
    bench.add_argument("--max-new-tokens", type=int, metavar="N", help=f"without --profile (default: {BENCH_TOKENS})")
    bench.add_argument("-n", "--num-prompts", type=int, metavar="N", help="only the first N prompts of each kind")
    bench.add_argument("--profile", action="store_true", help="a breakdown per op instead of decoding")
    bench.add_argument(
        "--context", type=int, metavar="N", help=f"committed tokens with --profile (default: {PROFILE_CONTEXT})"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


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
        with open(args.file, encoding="utf-8", newline="") as file:  # its bytes, as of standard input
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


def run_generate(args) -> int:
    check_used(args, "--mode", [args.mode])
    text = _read_prompt(args)
    from orthrus_rt import prompts
    from orthrus_rt.sampling import SamplingParams

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
    prompt_ids = prompts.encode(engine.tokenizer, text, chat=chat)
    check_length(prompt_ids, engine, "the prompt")
    if args.compare_ar:
        _warm_up(engine, prompt_ids)
    output, decoded = _decode(engine, prompt_ids, params, show=not args.json)
    other = None
    if args.compare_ar:
        same_seed = dataclasses.replace(params, seed=output.stats.seed)
        other = engine.generate(prompt_ids, same_seed, mode="ar")
    if args.json:
        print(json.dumps(_generate_facts(args, engine, prompt_ids, output, decoded, other)))
    else:
        if args.stats or other:
            print("\n" + _stats_table(engine, [(args.mode, output), *([("ar", other)] if other else [])]))
            print(_footer(args, engine, output))
        if other:
            print(f"identical tokens: {_verdict(engine, output, other)}")
    if output.finish_reason == "length" and len(output.token_ids) < args.max_new_tokens:
        _say(args, f"cut at --max-seq-len {engine.max_seq_len}, after {len(output.token_ids)} new tokens")
    elif output.finish_reason == "length" and chat and not args.ignore_eos:  # an answer has an end
        _say(args, f"cut at --max-new-tokens {args.max_new_tokens}")
    return EXIT_DIFFERENT if other and other.token_ids != output.token_ids else 0


def _warm_up(engine, prompt_ids) -> None:
    """A few tokens in both modes, so that neither one's rate carries first-use costs."""
    from orthrus_rt.sampling import SamplingParams

    for mode in (None, "ar"):
        engine.generate(prompt_ids, SamplingParams(max_new_tokens=4, ignore_eos=True), mode=mode)


def _decode(engine, prompt_ids, params, *, show: bool):
    """Generate, writing the text as it comes if ``show``. Returns ``(GenerationOutput, text)``."""
    from orthrus_rt.outputs import GenerationOutput
    from orthrus_rt.terminal import Screen
    from orthrus_rt.text_stream import TextStream

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
    """A row per ``(mode asked for, output)``, and below them the cycles of each plan that ``auto`` ran."""
    from orthrus_rt.terminal import table

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


def _generate_facts(args, engine, prompt_ids, output, text, other) -> dict:
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


def run_info(args) -> int:
    from orthrus_rt import info

    facts = info.collect(
        device=args.device, dtype=args.dtype, model=args.model, adapter=args.adapter, base_gguf=args.base_gguf
    )
    if args.json:
        print(json.dumps(facts))
    else:
        _print_info(facts)
    return _fail(args, facts["model"]["error"]) if "error" in facts["model"] else 0


def _print_info(facts: dict) -> None:
    from orthrus_rt.terminal import table

    versions = (f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    print("versions  " + ", ".join(versions))
    native = facts["native"]
    if native:
        cuda = f"CUDA {native['cuda_version']} for {native['cuda_archs']}" if native["cuda_archs"] else "no CUDA half"
        print(f"native    {native['compiler']}, {cuda}, CPU {native['cpu_isa']}")
    else:
        print(f"native    none, so ops run Triton or the reference: {facts['why_no_native']}")
    print("device    " + ", ".join(f"{k} {v}" for k, v in facts["device"].items()))
    print("model     " + ", ".join(f"{k} {v}" for k, v in facts["model"].items() if k != "error"))  # which ends it all
    rows = [(f"op ({facts['dtype']})", "runs on", "available")]
    rows += [(op, impl, ", ".join(facts["ops_available"][op])) for op, impl in facts["ops"].items()]
    print("\n" + table(rows))


def run_bench(args) -> int:
    from orthrus_rt import info, profile, rates, terminal

    check_num_prompts(args)
    if args.profile and "auto" in args.modes:
        raise ValueError(f"--profile takes one cycle apart: --modes must be among {', '.join(MODES)}, got auto")
    for name in ("max_new_tokens", "num_prompts") if args.profile else ("context",):
        if getattr(args, name) is not None:
            which = "with" if args.profile else "without"
            raise ValueError(f"--{name.replace('_', '-')} has no use {which} --profile")
    context = PROFILE_CONTEXT if args.context is None else args.context
    if context < 1:
        raise ValueError(f"--context must be >= 1, got {context}")
    check_used(args, "--modes", args.modes)
    engine = load_engine(args, max_batch_size=args.batch)
    facts = {"model": args.model, "device": info.device_facts(engine.device)["name"], "dtype": args.dtype}
    if args.profile:
        cycle = {"draft_len": args.draft_len, "fan_out": args.fan_out, "batch": args.batch, "context": context}
        tables = [profile.profile(engine, mode=mode, **cycle) for mode in args.modes]
    else:
        most = BENCH_TOKENS if args.max_new_tokens is None else args.max_new_tokens
        rows = rates.decode_rates(
            engine, ("code", "chat"), args.modes, draft_len=args.draft_len, fan_out=args.fan_out,
            num_prompts=args.num_prompts, max_new_tokens=most,
        )  # fmt: skip
        tables = [({"max_new_tokens": most}, rows)]
    if args.json:
        print(json.dumps(facts | {"tables": [about | {"rows": rows} for about, rows in tables]}))
        return 0
    print(", ".join(facts.values()))
    for about, rows in tables:
        print("\n" + ", ".join(f"{name} {terminal.figures(value)}" for name, value in about.items()))
        print(terminal.table([tuple(rows[0]), *(tuple(map(terminal.figures, row.values())) for row in rows)]))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if sys.stdout is None:
        return _fail(args, "standard output is closed, so nobody would see the answer")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # of what the terminal's encoding lacks
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader went away: nothing more can be said
        return EXIT_ERROR
    except (OSError, ValueError, ArithmeticError, RuntimeError, ImportError) as error:
        return _fail(args, error)
    except Exception:  # a bug of ours; Python's own exit code for it would say that tokens differ
        _tell(traceback.format_exc())
        return EXIT_ERROR
    finally:
        _flush_or_drop(sys.stdout)


def _flush_or_drop(stream) -> None:
    """What cannot be written is dropped: Python would try again at exit, complain, and exit with a code of its own."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(args, error) -> int:
    if isinstance(error, OSError) and error.filename is not None:
        _say(args, f"{error.filename}: {error.strerror}")
    else:
        _say(args, in_options(" ".join(str(error).split()), args))
    return EXIT_ERROR


def _say(args, message: str) -> None:
    _tell(f"orthrus-rt {args.command}: {message}\n")


def _tell(text: str) -> None:
    """To stderr, where there is one that takes it: the exit code says the rest."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # of a line, which is written at once
            sys.stderr.write(text)
        _flush_or_drop(sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
