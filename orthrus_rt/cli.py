"""The ``orthrus-rt`` command. Everything heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback

from orthrus_rt import cli_generate, cli_verify, versions
from orthrus_rt.cli_options import (
    add_model_options,
    check_length,
    check_num_prompts,
    check_used,
    flush_or_drop,
    import_torch,
    in_options,
    load_engine,
    say,
    tell,
)
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.terminal import figures, table

EXIT_ERROR, EXIT_INTERRUPTED = 2, 128 + signal.SIGINT
BENCH_TOKENS, PROFILE_CONTEXT = 64, 256
BENCH_KINDS = "code", "chat"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthrus-rt",
        description="Lossless dual-view decoding: drafts from a diffusion view, verified by the autoregressive view.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {versions.own()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    cli_generate.add_parser(commands)

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


def run_info(args) -> int:
    import_torch()
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
    versions = (f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())
    print("versions  " + ", ".join(versions))
    native = facts["native"]
    if native:
        cuda = f"CUDA {native['cuda_version']} for {native['cuda_archs']}" if native["cuda_archs"] else "no CUDA half"
        print(f"native    {native['compiler']}, {cuda}, CPU {native['cpu_isa']}")
    else:
        print(f"native    none, so ops run Triton or the reference: {facts['why_no_native']}")
    print("device    " + ", ".join(f"{k} {v}" for k, v in facts["device"].items()))
    print("model     " + ", ".join(f"{k} {v}" for k, v in facts["model"].items() if k != "error"))  # reported last
    rows = [(f"op ({facts['dtype']})", "runs on", "available")]
    rows += [(op, impl, ", ".join(facts["ops_available"][op])) for op, impl in facts["ops"].items()]
    print("\n" + table(rows))


def run_bench(args) -> int:
    import_torch()
    from orthrus_rt import info, profile, rates

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
        ids = {kind: _bench_prompts(engine, kind, args.num_prompts) for kind in BENCH_KINDS}
        options = {"draft_len": args.draft_len, "fan_out": args.fan_out, "max_new_tokens": most}
        rows = rates.decode_rates(engine, ids, args.modes, **options)
        tables = [({"max_new_tokens": most}, rows)]
    if args.json:
        print(json.dumps(facts | {"tables": [about | {"rows": rows} for about, rows in tables]}))
        return 0
    print(", ".join(facts.values()))
    for about, rows in tables:
        print("\n" + ", ".join(f"{name} {figures(value)}" for name, value in about.items()))
        print(table([tuple(rows[0]), *(tuple(map(figures, row.values())) for row in rows)]))
    return 0


def _bench_prompts(engine, kind: str, num_prompts: int | None) -> list[list[int]]:
    """The built-in prompts of a kind; one that the engine has no room for is refused."""
    from orthrus_rt import prompts

    all_ids = []
    for prompt in prompts.load(kind)[:num_prompts]:
        all_ids.append(prompt.encode(engine.tokenizer))
        what = f"built-in prompt, {prompt.name}"
        check_length(all_ids[-1], engine, what, "; a lower --num-prompts may leave it out")
    return all_ids


def main(argv: list[str] | None = None) -> int:
    if argv is None:  # a process of its own: torch's threads, which load weights, should not spin and slow others down
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = build_parser().parse_args(argv)
    if sys.stdout is None:
        return _fail(args, "standard output is closed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader is gone: nothing more can be written
        return EXIT_ERROR
    except (OSError, ValueError, ArithmeticError, RuntimeError, ImportError) as error:
        return _fail(args, error)
    except Exception:  # a bug of ours; Python's own exit code for it would mean that tokens differ
        tell(traceback.format_exc())
        return EXIT_ERROR
    finally:
        flush_or_drop(sys.stdout)


def _fail(args, error) -> int:
    if isinstance(error, OSError) and error.filename is not None:
        say(args, f"{error.filename}: {error.strerror}")
    else:
        say(args, in_options(" ".join(str(error).split()), args))
    return EXIT_ERROR
