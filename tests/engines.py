"""Engines on the CPU as most tests make them, and what their steps have reported for each request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from orthrus_rt.checkpoint import load_config
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput

Told = dict[str, tuple[list[int], str | None]]  # tokens so far and finish reason, by request id


def make(folder: str, pads_prefill: bool = False, *, mode: str = "two_pass", draft_len=None, **how) -> Engine:
    """An engine on the CPU; with ``pads_prefill``, prefill passes are padded, recorded and replayed as on CUDA. By
    default it drafts the checkpoint's whole block, and one_pass has up to 6 hypotheses, as on CUDA.

    No default sizes: ``make = partial(engines.make, max_seq_len=128)`` shows in each file which its tests depend on.
    """
    draft_len = load_config(folder).block_len - 1 if draft_len is None else draft_len
    if mode == "one_pass":
        how = {"fan_out": min(6, 3 * draft_len + 1)} | how
    engine = Engine.from_pretrained(folder, device="cpu", mode=mode, draft_len=draft_len, **how)
    engine.runner.pads_prefill = pads_prefill
    return engine


def take(outputs: list[RequestOutput], told: Told) -> None:
    """Add what one step reported."""
    for out in outputs:
        tokens, _ = told.get(out.request_id, ([], None))
        told[out.request_id] = tokens + out.new_token_ids, out.finish_reason


def drain(engine: Engine, told: Told | None = None) -> Told:
    """Step to the end. Returns what the steps reported, added to ``told`` if given."""
    told = {} if told is None else told
    while engine.has_unfinished():
        take(engine.step(), told)
    return told


def all_pages_back(engine: Engine) -> None:
    assert engine.kv.num_free_pages == engine.kv.num_pages
    assert bool((engine.kv.page_table == 0).all())
    assert not any(engine.scheduler.slots) and not engine.scheduler._live


@contextlib.contextmanager
def a_beginning_each(engine: Engine, tokens: int = 8) -> Iterator[None]:
    """Inside it, requests get their first ``tokens`` and few more, so only an abort ends longer ones, however slowly
    other clients of the engine are served.
    """
    step = engine.step

    def step_unless_all_have_theirs():
        unfinished = engine.scheduler.unfinished
        if not unfinished or any(len(request.tokens) < tokens for request in unfinished):
            return step()
        time.sleep(0.001)  # time in which the clients are served
        return []

    engine.step = step_unless_all_have_theirs
    try:
        yield
    finally:
        engine.step = step
