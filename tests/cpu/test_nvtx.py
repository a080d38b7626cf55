"""NVTX ranges, with a recorder instead of the profiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthrus_rt import dispatch, nvtx

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3-tied-k8"
CODE = f"""
import json, torch
events = []
torch.cuda.nvtx.range_push = lambda name: events.append(name)
torch.cuda.nvtx.range_pop = lambda: events.append(None)
import orthrus_rt
options = dict(device="cpu", mode="two_pass", dtype="float32", max_seq_len=32)
engine = orthrus_rt.Engine.from_pretrained({str(GOLDEN)!r}, **options)
engine.generate([1, 2, 3], orthrus_rt.SamplingParams(max_new_tokens=4, ignore_eos=True))
print(json.dumps(events))
"""


@pytest.mark.skipif(nvtx.ENABLED, reason="ORTHRUS_NVTX is set")
def test_off_returns_functions_as_they_are():
    assert not nvtx.ENABLED and nvtx.ranged("x")(len) is len


def test_ranges_nest_cycle_pass_layer_op():
    env = {**os.environ, "ORTHRUS_NVTX": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=True)
    depth, paths = [], set()
    for name in json.loads(done.stdout):
        if name is None:
            depth.pop()
        else:
            depth.append(name)
            paths.add("/".join(depth))
    assert not depth
    layers = {p.split("/")[-1] for p in paths if p.split("/")[-1].startswith("layer")}
    assert layers == {"layer 0", "layer 1"}
    for one_pass in ("prefill", "two_pass cycle/draft pass", "two_pass cycle/verify pass"):
        for op in ("rms_norm", "row_linear", "qkv_commit", "dual_attn"):
            assert f"{one_pass}/layer 1/{op}" in paths
        assert f"{one_pass}/embed" in paths
    assert "two_pass cycle/consensus" in paths
    ops = {p.split("/")[-1] for p in paths} - layers - {"prefill", "two_pass cycle", "draft pass", "verify pass"}
    assert ops == set(dispatch.OPS) - {"process_logits", "count_tokens"}


def test_a_torch_that_has_none_says_so_once(monkeypatch):
    """For example a build for the CPU alone."""

    def lacking(_):
        raise RuntimeError("NVTX functions not installed.")

    monkeypatch.setattr(nvtx, "ENABLED", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lacking)
    nvtx._warn.cache_clear()
    five = nvtx.ranged("x")(lambda: 5)
    said = "ORTHRUS_NVTX is set, but there will be no ranges: NVTX functions not installed."
    with pytest.warns(UserWarning, match=said) as told:
        assert (five(), five()) == (5, 5)
    assert len(told) == 1
