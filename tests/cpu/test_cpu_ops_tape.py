"""The tape of native CPU calls."""

import threading

import pytest
import torch

from orthrus_rt import dispatch, ops, recording
from tests.native_cpu import threads
from tests.native_layer import Layer


def test_tape_replays_what_eager_runs(isa, element):
    """Recording runs nothing. A replay reads what the buffers hold at that time, and gives the bits of an eager run."""
    eager, taped = Layer(), Layer()
    tape = dispatch.extension().cpu.Tape()
    with tape:
        taped.run()
    assert len(tape) == 6
    assert bool(taped.logits.isnan().all())
    for shift in range(3):
        for layer in (eager, taped):
            layer.rows.token.copy_((torch.arange(24) + shift) % 40)
        eager.run()
        tape.replay()
        assert torch.equal(taped.logits, eager.logits)
        assert torch.equal(taped.pages, eager.pages)


def test_a_recording_runs_on_the_threads_that_torch_has_then(monkeypatch):
    seen, layer = [], Layer()  # the tape points into the layer
    tape = recording.taped(layer.run)
    monkeypatch.setattr(dispatch.extension().cpu, "set_num_threads", seen.append)
    for count in (3, 1):
        with threads(count):
            recording.replay(tape)
    assert seen == [3, 1]


def test_a_tape_takes_in_what_another_replays(isa):
    eager, taped = Layer(), Layer()
    inner, outer = dispatch.extension().cpu.Tape(), dispatch.extension().cpu.Tape()
    with inner:
        taped.run()
    with outer:
        inner.replay()
        taped.run()
    assert (len(inner), len(outer)) == (6, 12) and bool(taped.logits.isnan().all())
    del inner
    eager.run()
    outer.replay()
    assert torch.equal(taped.logits, eager.logits) and torch.equal(taped.pages, eager.pages)


def test_a_replay_flushes_no_subnormal_number():
    """Whatever the mode of the thread that replays."""
    x, norm, out = torch.full((1, 19), 8e-39), torch.ones(19), torch.zeros(1, 19)
    tape = dispatch.extension().cpu.Tape()
    with tape:
        ops.rms_norm(x, norm, 1e-5, out)
    if not torch.set_flush_denormal(True):
        pytest.skip("not on this machine")
    try:
        tape.replay()
    finally:
        torch.set_flush_denormal(False)
    assert bool(out.all())


def filling(out, value):
    """An op that fills ``out`` with ``value``."""
    table, token = torch.full((1, out.shape[1]), float(value)), torch.zeros(len(out), dtype=torch.int32)
    return (lambda: ops.embed(token, table, out)), (table, token)


def test_a_tape_keeps_the_order_and_forgets_what_it_held():
    out = torch.zeros(1, 8)
    (first, _kept), (last, _too) = (filling(out, value) for value in (1, 2))
    inner, outer = dispatch.extension().cpu.Tape(), dispatch.extension().cpu.Tape()
    for begin, end, want in ((first, last, 2), (last, first, 1)):
        with inner:
            end()
        with outer:
            begin()
            inner.replay()
        assert (len(inner), len(outer)) == (1, 2)
        outer.replay()
        assert out.eq(want).all()


def test_a_tape_records_its_own_thread_alone():
    out, tape = torch.zeros(1, 8), dispatch.extension().cpu.Tape()
    op, _kept = filling(out, 3)
    with tape:
        other = threading.Thread(target=op)
        other.start()
        other.join()
    assert len(tape) == 0 and out.eq(3).all()


def test_tape_misuse():
    cpu = dispatch.extension().cpu
    tape = cpu.Tape()
    with tape:
        with pytest.raises(RuntimeError, match="another tape is recording"), cpu.Tape():
            pass
        with pytest.raises(RuntimeError, match="this tape is recording"):
            tape.replay()
    with pytest.raises(KeyError), tape:
        raise KeyError
    tape.replay()
    assert len(tape) == 0


def test_no_recording_outlives_an_interrupt_or_its_tape(monkeypatch):
    """Ctrl-C may come after the recording has begun and before ``with`` would end it."""
    cpu = dispatch.extension().cpu

    def interrupted(tape, enter=cpu.Tape.__enter__):
        enter(tape)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cpu.Tape, "__enter__", interrupted)
        with pytest.raises(KeyboardInterrupt) as error:  # which still holds the frame, and so the tape
            recording.taped(None)
    with cpu.Tape():
        assert error.type is KeyboardInterrupt
    cpu.Tape().__enter__()  # it ends with the tape, which nothing else holds
    with cpu.Tape() as _, pytest.raises(RuntimeError, match="another tape is recording"), cpu.Tape():
        pass
