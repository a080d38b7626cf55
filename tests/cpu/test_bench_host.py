"""The benchmark of the host's work computes nothing, yet every step is a complete one."""

import pytest
import torch

from bench.bench_host import microseconds
from orthrus_rt import ops


@pytest.mark.native
@pytest.mark.parametrize("mode", ["ar", "two_pass", "one_pass", "auto"])
def test_every_cycle_emits_and_none_computes(mode, monkeypatch):
    passes, row_linear = [], ops.row_linear
    monkeypatch.setattr(ops, "row_linear", lambda *args, **how: passes.append(args) or row_linear(*args, **how))
    cpu = torch.device("cpu")
    times = microseconds(cpu, mode, 2, 10)  # checks that each step emits for both sequences
    assert len(times) == 10 and min(times) > 0
    prefilled = len(passes)
    passes.clear()
    microseconds(cpu, mode, 2, 40)
    assert len(passes) == prefilled > 0
