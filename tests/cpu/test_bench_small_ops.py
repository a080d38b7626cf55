"""The benchmarks of ops that take microseconds: both sides compute the same, and a timed run is many real calls."""

import json
import sys

import pytest
import torch

from bench import bench_embed, bench_qkv_commit, bench_rms_norm, small_ops
from bench.models import config_of

SCRIPTS = (bench_embed, bench_qkv_commit, bench_rms_norm)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("num_rows", (1, 5))
def test_op_and_baseline_compute_the_same(script, num_rows):
    case = script.Case(config_of("tiny"), num_rows, torch.device("cpu"))
    assert case.max_error() < 0.004
    case.call()
    out = case.q_out if case.op == "qkv_commit" else case.out
    own = out.clone()
    out.fill_(99)
    assert small_ops.error_of(case.call_baseline(), own) < 0.01
    expected = {"embed": 2 * 128 * 2 + 4, "qkv_commit": 2 * (4 + 2 * 2) * 64 * 2 + 4 * 64, "rms_norm": 2 * 128 * 2}
    assert case.nbytes == num_rows * expected[case.op] + (128 * 4 if case.op == "rms_norm" else 0)


def test_half_of_the_rows_are_a_diffusion_blocks():
    rows = bench_qkv_commit.Case(config_of("tiny"), 5, torch.device("cpu")).rows
    assert (rows.num_rows_ar, rows.num_rows_diff) == (3, 2)
    assert rows.position.tolist() == [1000, 1001, 1002, 1000, 1001] and not rows.seq.any()


@pytest.mark.native
def test_a_run_is_many_calls(monkeypatch):
    monkeypatch.setattr("bench.common.SPINNING_S", 0.0)
    case, calls = bench_rms_norm.Case(config_of("tiny"), 3, torch.device("cpu")), []
    monkeypatch.setattr(case, "call_baseline", lambda: calls.append(case.out.fill_(99)))
    took, baseline = small_ops.times(case, repeats=2)
    assert set(took) == {"p50", "p20", "p80"} and baseline > 0
    assert len(calls) == 5 * small_ops.CALLS  # three rounds to warm up
    tape = small_ops.taped(small_ops.over_and_over(case.call))
    assert len(tape) == small_ops.CALLS
    case.out.fill_(99)
    small_ops.replay(tape)
    assert case.out.abs().max() < 99


@pytest.mark.parametrize("script", SCRIPTS)
def test_report(script, monkeypatch, tmp_path):
    options = ["--device", "cpu", "--model", "tiny", "--rows", "1", "3", "--out", str(tmp_path)]
    monkeypatch.setattr("bench.common.SPINNING_S", 0.0)
    monkeypatch.setattr(sys, "argv", [script.__name__, *options])
    monkeypatch.setattr(small_ops, "read_bandwidth", lambda _: 10.0)
    script.main()
    op = script.Case.op
    rows = json.loads((tmp_path / f"{op}_cpu.json").read_text())["rows"]
    assert [(row["op"], row["model"], row["rows"]) for row in rows] == [(op, "tiny", 1), (op, "tiny", 3)]
    for row in rows:
        nbytes = script.Case(config_of("tiny"), row["rows"], torch.device("cpu")).nbytes
        assert row["GB/s"] == pytest.approx(nbytes / row["us p50"] / 1e3)
        assert row["share of read bandwidth"] == pytest.approx(row["GB/s"] / 10)
        assert row["max error"] < 0.004
