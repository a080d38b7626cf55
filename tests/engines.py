"""Engines on the CPU as most tests make them, and what their steps have told of each request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from orthrus_rt.checkpoint import load_config
from orthrus_rt.engine import Engine
from orthrus_rt.outputs import RequestOutput

Told = dict[str, tuple[list[int], str | None]]  # tokens so far and finish reason, by request id


def make(folder: str, pads_prefill: bool = False, *, mode: str = "two_pass", draft_len=None, **how) -> Engine:
    """On the CPU, and with ``pads_prefill`` its prefill passes padded, recorded and replayed as on CUDA. Drafts are the
    checkpoint's whole block by default, and of one_pass 6 of them, as there.

    No sizes: ``make = partial(engines.make, max_seq_len=128)`` shows in each file those that its tests depend on.
    """
    draft_len = load_config(folder).block_len - 1 if draft_len is None else draft_len
    if mode == "one_pass":
        how = {"fan_out": min(6, 3 * draft_len + 1)} | how
    engine = Engine.from_pretrained(folder, device="cpu", mode=mode, draft_len=draft_len, **how)
    engine.runner.pads_prefill = pads_prefill
    return engine


def take(outputs: list[RequestOutput], told: Told) -> None:
    """Add what one step told."""
    for out in outputs:
        tokens, _ = told.get(out.request_id, ([], None))
        told[out.request_id] = tokens + out.new_token_ids, out.finish_reason


def drain(engine: Engine, told: Told | None = None) -> Told:
    """Step to the end; what that told, added to ``told`` if given."""
    told = {} if told is None else told
    while engine.has_unfinished():
        take(engine.step(), told)
    return told


@contextlib.contextmanager
def a_beginning_each(engine: Engine, tokens: int = 8) -> Iterator[None]:
    """Meanwhile requests have their first ``tokens`` and few more: an abort alone ends longer ones, however slowly
    those who share the engine are served.
    """
    step = engine.step

    def step_unless_all_have_theirs():
        unfinished = engine.scheduler.unfinished
        if not unfinished or any(len(request.tokens) < tokens for request in unfinished):
            return step()
        time.sleep(0.001)  # in which they are served
        return []

    engine.step = step_unless_all_have_theirs
    try:
        yield
    finally:
        engine.step = step
