"""What the commands share: options for model and engine, their checks, and the output of errors and differences."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

EXIT_DIFFERENT = 1  # the exit code of a command that finds different tokens
USES = {"draft_len": ("auto", "two_pass", "one_pass"), "fan_out": ("auto", "one_pass")}  # option -> modes


def add_model_options(parser: argparse.ArgumentParser, *, engine: bool) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="smollm2-135m",
        help="smollm2-135m (default), a checkpoint folder, or a hub id as owner/name or owner/name@revision",
    )
    group.add_argument("--adapter", metavar="PATH", help="folder or hub id of a diffusion view for a base")
    group.add_argument("--base-gguf", metavar="PATH", help="the embedded model's base as a GGUF file")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: %(default)s"
    )
    if engine:
        group.add_argument("--max-seq-len", type=int, metavar="N", help="prompt and output (default: up to 4096)")
        parser.add_argument(
            "--draft-len",
            type=int,
            metavar="N",
            help="drafts per cycle, in auto the maximum (default: the checkpoint's K-1; on a CPU 3, or in one_pass as "
            "many as F needs, except in auto)",
        )
        parser.add_argument(
            "--fan-out",
            type=int,
            metavar="F",
            help="blocks that a one_pass cycle drafts (default: 6, with 31 drafts 4; on a CPU 2; in auto 2, 4 or 8)",
        )


def import_torch() -> None:
    """Import torch, while Ctrl-C ends the process at once: as an exception it would be lost there, or leave a module
    half imported.
    """
    by_exception = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the caller handles it
    if "torch" in sys.modules or not by_exception or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)


def load_engine(args, mode: str = "auto", max_batch_size: int = 1):
    """The engine, without prefix caching: runs are compared or timed, and prompts repeat."""
    import_torch()
    from orthrus_rt.engine import Engine

    return Engine.from_pretrained(
        args.model, device=args.device, dtype=args.dtype, mode=mode, max_seq_len=args.max_seq_len,
        draft_len=args.draft_len, fan_out=args.fan_out, adapter=args.adapter,
        base_gguf=args.base_gguf, max_batch_size=max_batch_size, prefix_caching=False,
    )  # fmt: skip


def read_utf8(source: str, read: Callable[[], str]) -> str:
    """The text that ``read`` returns, without a byte order mark. Bytes that are not UTF-8 make ``read`` fail or, from
    the shell, are surrogates in its text.
    """
    try:
        return read().encode(errors="surrogateescape").decode().removeprefix("\ufeff")
    except UnicodeError as error:
        got = error.object[error.start : error.end]
        raise ValueError(f"the prompt ({source}) must be UTF-8 text, got {got!r} at position {error.start}") from None


def check_num_prompts(args) -> None:
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num-prompts must be >= 1, got {args.num_prompts}")


def check_used(args, option: str, modes: list[str]) -> None:
    """Refuse ``--draft-len`` and ``--fan-out`` if no mode in ``modes`` uses them."""
    for name, users in USES.items():
        if getattr(args, name) is not None and not set(users) & set(modes):
            has = f"--{name.replace('_', '-')} belongs to {', '.join(users)}"
            raise ValueError(f"{has}: {option} must name one of them, got {' '.join(modes)}")


def require_sampling(option: str, params) -> None:
    """Refuse ``option``, which only affects sampling, at temperature 0."""
    if params.greedy:
        raise ValueError(f"{option} is for sampling: --temperature must be above 0, got 0")


def check_length(ids: list[int], engine, what: str, instead: str = "") -> None:
    """Refuse a prompt that is too long; ``instead`` says what to do if the model itself cannot take it."""
    if len(ids) >= (most := engine.config.most_positions):
        raise ValueError(f"{what} has {len(ids)} tokens: this model takes fewer than {most}{instead}")
    if len(ids) >= engine.max_seq_len:
        raise ValueError(f"{what} has {len(ids)} tokens: --max-seq-len must be above that, got {engine.max_seq_len}")


def tokens_text(tokenizer, tokens) -> str:
    """Two tokens that differ, as text; None means that the sequence has ended."""
    return " against ".join("the end" if t is None else f"{t} {tokenizer.decode([t])!r}" for t in tokens)


def in_options(message: str, args) -> str:
    """Replace argument names in an API error by option names. A name that is also an English word is replaced only
    before ``=``, or before " must" at the start. Quoted text stays. Where arguments to lower are listed, those without
    an option are left out.
    """
    names = {name: "--" + name.replace("_", "-") for name in vars(args) if name not in ("command", "run", "prompt")}
    names |= {"max_batch_size": names.get("batch", "max_batch_size"), "prompt_ids": "prompt"}

    def offered(knobs: re.Match) -> str:
        have = [knob for knob in re.split(", | or ", knobs[0]) if names.get(knob, knob) != knob]
        return " or ".join(filter(None, [", ".join(have[:-1]), have[-1]])) if have else knobs[0]

    message = re.sub(r"(?<=: lower )\w+(, \w+)* or \w+", offered, message)

    def option(found: re.Match) -> str:
        name, follows = found.groups()
        if name is None:
            return found[0]
        if "_" in name or follows == "=" or (not found.start() and follows == " must"):
            return names[name] + (" " if follows == "=" else follows)
        return found[0]

    message = message.removeprefix("SamplingParams: ")
    return re.sub(rf"'[^']*'|(?<![\w./?&@-])({'|'.join(names)})(=| must|(?![\w/=-]|\.\w))", option, message)


def say(args, message: str) -> None:
    tell(f"orthrus-rt {args.command}: {message}\n")


def tell(text: str) -> None:
    """Write to stderr if possible; if not, only the exit code reports the failure."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # a whole line is written at once, not at the flush
            sys.stderr.write(text)
        flush_or_drop(sys.stderr)


def flush_or_drop(stream) -> None:
    """Drop what cannot be written: Python would try again at exit, complain, and exit with a code of its own."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
