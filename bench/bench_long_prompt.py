"""How a long prompt and decoding sequences delay each other, by how much of the prompt a step takes.

``batch`` sequences of the embedded model decode when a prompt of ``--prompt`` tokens arrives. ``step_ms`` is the median
step before it arrives. Until the prompt's first token: ``longest_step_ms`` is the longest wait of the others,
``others_tok_s`` the tokens per second of all of them, and ``ttft_s`` the time to that token. ``chunk`` is the most
prompt tokens per step; ``own`` marks the engine's default. Medians over rounds in which the chunk sizes are
interleaved.

    python -m bench.bench_long_prompt --out DIR
"""

from __future__ import annotations

import random
import time
from statistics import median
from unittest import mock

from bench import common
from orthrus_rt import runner
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput
from orthrus_rt.sampling import SamplingParams

CONTEXT, STEPS = 64, 15  # tokens of a decoding sequence's prompt; steps before the long prompt arrives


def step(engine: Engine) -> tuple[float, list[RequestOutput]]:
    start = time.perf_counter()
    outs = engine.step()
    return time.perf_counter() - start, outs


def measure(engine: Engine, prompt: list[int], others: list[list[int]]) -> dict:
    ids = [engine.submit(one, SamplingParams(2048, ignore_eos=True)) for one in others]
    while any(r is None or not r.decoding for r in engine.scheduler.slots[: len(others)]):
        engine.step()
    before = [step(engine)[0] for _ in range(STEPS)]
    seconds, tokens, arrived = [], 0, engine.submit(prompt, SamplingParams(1, ignore_eos=True))
    while True:
        took, outs = step(engine)
        seconds.append(took)
        tokens += sum(len(out.new_token_ids) for out in outs if out.request_id != arrived)
        if any(out.request_id == arrived for out in outs):
            break
    for one in ids:
        engine.abort(one)
    while engine.has_unfinished():
        engine.step()
    return {
        "step_ms": 1e3 * median(before),
        "longest_step_ms": 1e3 * max(seconds),
        "ttft_s": sum(seconds),
        "others_tok_s": tokens / sum(seconds),
    }


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["ar", "two_pass"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--draft-len", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device, rows = args.device.type, []
    own = runner.CHUNK_BESIDE[device]
    for mode in args.modes:
        drawn, options = random.Random(0), {} if mode == "ar" else {"draft_len": args.draft_len}
        options |= dict(max_seq_len=max(4096, args.prompt + 64), max_batch_size=args.batch + 1)
        with common.embedded_engine(args.device, mode, **options) as engine:
            lengths, vocab = (args.prompt, *[CONTEXT] * args.batch), engine.config.vocab_size - 1
            prompt, *others = ([drawn.randrange(vocab) for _ in range(length)] for length in lengths)
            found: dict[int, list[dict]] = {chunk: [] for chunk in args.chunks}
            for _ in range(args.rounds + 1):
                for chunk, measured in found.items():
                    with mock.patch.dict(runner.CHUNK_BESIDE, {device: chunk}):
                        measured.append(measure(engine, prompt, others))
            accepted = common.accepted_share(common.drafts(engine))
        for chunk, (_, *measured) in found.items():  # the first was a warm-up
            row = {"mode": mode, "batch": args.batch, "prompt": args.prompt, "chunk": chunk, "own": chunk == own}
            rows.append(
                row | {name: median(one[name] for one in measured) for name in measured[0]} | {"accepted": accepted}
            )
            print(rows[-1], flush=True)
    facts = common.header(args.device) | {"draft_len": args.draft_len}
    common.report(f"long_prompt-{device}", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
