"""A warm decode step allocates nothing, reads back only the results, and runs no Python per layer."""

import collections
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orthrus_rt import dispatch, ops
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.engine import Engine
from orthrus_rt.results import SlotResults
from orthrus_rt.sampling import SamplingParams
from tests import checkpoints

pytestmark = pytest.mark.native

STEPS = 4
GREEDY = SamplingParams(max_new_tokens=60, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=60, ignore_eos=True, temperature=0.8, top_p=0.9, seed=1)
EDITED = SamplingParams(max_new_tokens=60, ignore_eos=True, frequency_penalty=0.5, logit_bias={5: 1.0}, min_tokens=9)


class Counted(TorchDispatchMode):
    """Counts every torch operator call, including ``.item()`` (``aten._local_scalar_dense``) and allocations."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A separate cache directory for what auto measures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def decoding(tmp_path, mode, layers, params):
    """A warm engine with two sequences in the middle of decoding, with no page boundary ahead."""
    folder = checkpoints.make(tmp_path / f"{layers}", dtype=torch.bfloat16, num_hidden_layers=layers)
    engine = Engine.from_pretrained(str(folder), device="cpu", max_seq_len=128, max_batch_size=2, mode=mode)
    engine.warmup()
    for prompt in ([1, 2, 3], [4]):
        engine.submit(prompt, params)
    while not all(r is not None and r.decoding and len(r.tokens) > 1 for r in engine.scheduler.slots):
        engine.step()
    return engine


def counted(engine, patched):
    """Runs ``STEPS`` steps; returns torch operators, calls of our ops, results read and tokens emitted."""
    op_calls, read = [], []
    real = SlotResults.read

    def counted_read(results, seen):
        read.append([slot for slot, _ in seen])
        return real(results, seen)

    patched.setattr(SlotResults, "read", counted_read)
    patched.setattr(torch.Tensor, "tolist", None)
    for op in dispatch.OPS:
        patched.setattr(ops, op, lambda *_, op=op, **__: op_calls.append(op))
    with Counted() as torch_ops:
        emitted = sum(len(out.new_token_ids) for _ in range(STEPS) for out in engine.step())
    return torch_ops.calls, op_calls, read, emitted


@pytest.mark.parametrize(
    ("mode", "params"),
    # A warm-up does not time cycles that sample. auto times them one by one as they run.
    [*itertools.product(MODES, (GREEDY, SAMPLED, EDITED)), ("auto", GREEDY)],
    ids=(*(f"{mode}-{kind}" for mode in MODES for kind in ("greedy", "sampled", "edited")), "auto-greedy"),
)
def test_a_step_is_one_replay_and_one_reading(tmp_path, mode, params, monkeypatch):
    for layers in (2, 6):
        engine = decoding(tmp_path, mode, layers, params)
        before, cycles = engine.memory_report(), engine.metrics.cycles
        with monkeypatch.context() as patched:
            torch_ops, op_calls, read, emitted = counted(engine, patched)
        assert engine.metrics.cycles - cycles == STEPS and emitted >= 2 * STEPS
        assert not op_calls  # no Python per op, so none per layer
        assert read == [[0, 1]] * STEPS
        assert not torch_ops  # no allocation, no .item()
        assert engine.memory_report() == before
