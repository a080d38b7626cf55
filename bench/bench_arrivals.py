"""What an arriving prompt costs the decoding sequences: in the last pass of their cycle, and in a pass of its own.

``batch`` sequences of the embedded model decode. In every step one more prompt arrives and generates a single token.
``step_ms`` is the time of a step without arrivals, ``with_ms`` of one with a prompt in the cycle, as the engine does
it, and ``own_pass_ms`` of one in which the prompt has a pass of its own. The three are interleaved.

    python -m bench.bench_arrivals --out DIR
"""

from __future__ import annotations

import random
import time
from unittest import mock

import torch

from bench import common
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.engine import Engine
from orthrus_rt.rounds import Rounds
from orthrus_rt.sampling import SamplingParams

STEPS = 8  # of one kind in a row: a GPU runs a step ahead, and all but the first step follow one of the same kind
CONTEXT = 64


def own_pass():
    """Patch the engine so that prompts wait until the cycle is launched."""
    real = Rounds._launch

    def launch(rounds, running, before):
        with mock.patch.object(rounds, "_chunks", lambda room: []):
            real(rounds, running, before)
        rounds._prefill(rounds._chunks(rounds.runner.most_prompt_rows_beside))

    return mock.patch.object(Rounds, "_launch", launch)


def step_ms(engine: Engine, prompts: list[list[int]]) -> float:
    """Mean milliseconds of a step, over one step for each of ``prompts``; an empty prompt means no arrival."""
    start, names, ended = time.perf_counter(), set(), set()
    for prompt in prompts:
        if prompt:
            names.add(engine.submit(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True)))
        ended.update(out.request_id for out in engine.step() if out.finished)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    seconds = time.perf_counter() - start
    ended.update(out.request_id for _ in range(2) for out in engine.step() if out.finished)  # results a step late
    if ended - names:
        raise ValueError("a sequence that decodes has ended: fewer --rounds")
    if names - ended:
        raise ValueError(
            f"--prompt must fit a step beside those who decode, {engine.runner.most_prompt_rows_beside} rows"
        )
    return 1e3 * seconds / len(prompts)


def measure(mode: str, batch: int, length: int, args) -> dict:
    drawn = random.Random(0)
    options = {} if mode == "ar" else {"draft_len": args.draft_len}
    with common.embedded_engine(args.device, mode, max_batch_size=batch + 2, **options) as engine:
        vocab = engine.config.vocab_size - 1

        def some(length: int) -> list[int]:
            return [drawn.randrange(vocab) for _ in range(length)]

        for _ in range(batch):
            engine.submit(some(CONTEXT), SamplingParams(max_new_tokens=2048, ignore_eos=True))
        while any(r is None or not r.decoding for r in engine.scheduler.slots[:batch]):
            engine.step()
        times: dict[str, list[float]] = {"step_ms": [], "with_ms": [], "own_pass_ms": []}
        for turn in range(args.rounds + 2):  # two warm up: cycles are recorded when they run for the second time
            times["step_ms"].append(step_ms(engine, [[]] * STEPS))
            times["with_ms"].append(step_ms(engine, [some(length) for _ in range(STEPS)]))
            with own_pass():
                times["own_pass_ms"].append(step_ms(engine, [some(length) for _ in range(STEPS)]))
            if turn == 1:
                for column in times.values():
                    column.clear()
        accepted = common.accepted_share(common.drafts(engine))
    ms = {name: common.percentiles(values)["p50"] for name, values in times.items()}
    added = {name: ms[name] - ms["step_ms"] for name in ("with_ms", "own_pass_ms")}
    saved = 1 - added["with_ms"] / added["own_pass_ms"]
    return (
        {"mode": mode, "batch": batch, "prompt": length}
        | ms
        | {"saved_of_what_an_arrival_adds": saved, "accepted": accepted}
    )


def main() -> None:
    parser = common.parser_of(__doc__, device="auto")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["ar", "two_pass"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 128], help="tokens of an arriving prompt")
    parser.add_argument("--draft-len", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for mode in args.modes:
        for batch in args.batch:
            for length in args.prompt:
                rows.append(measure(mode, batch, length, args))
                print(rows[-1], flush=True)
    facts = common.header(args.device) | {"draft_len": args.draft_len}
    common.report(f"arrivals-{args.device.type}", facts, rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
