"""The profile and the decode benchmark on CUDA: events, graphs and kernel times instead of the host's clock."""

import contextlib
import json
import math

import pytest
import torch

from bench import bench_decode
from bench.baselines import GrowingCache, StaticCache, Weights, generate
from orthrus_rt import checkpoint, profile
from orthrus_rt.engine import Engine
from tests import checkpoints

pytestmark = pytest.mark.gpu


def test_profile_times_every_call(tmp_path):
    folder = str(checkpoints.make(tmp_path, dtype=torch.bfloat16))
    with contextlib.closing(Engine.from_pretrained(folder, device="cuda", mode="two_pass", max_seq_len=256)) as engine:
        facts, rows = profile.profile(engine, mode="two_pass", batch=2, context=100, repeats=3)
        assert sum(row["calls"] for row in rows) == 2 * (2 * 8 + 3) + 3  # passes, layers, around them; consensus
        assert all(row["us"] > 0 and row["gb_s"] > 0 for row in rows) and facts["cycle_us"] > 0
        saved = {row["op"]: row["in_cycle_us"] for row in rows}
        assert all(map(math.isfinite, saved.values())) and sum(saved.values()) > 0
        assert engine.kv.num_free_pages == engine.kv.num_pages
        engine.generate([1, 2, 3])


@torch.inference_mode()
def test_the_graphed_baseline_gives_the_eager_ones_tokens(tmp_path):
    folder = str(checkpoints.make(tmp_path, diff_noise=0.02))
    weights = Weights(checkpoint.load(folder), "cuda", torch.float32, 192, fused=True)
    for mode in ("ar", "two_pass"):
        for prompt in ([3, 1, 4, 1, 5], [7]):
            eager = generate(GrowingCache(weights, mode, 7), [prompt], 40)
            assert generate(StaticCache(weights, mode, 7, 1, 192), [prompt], 40) == eager


def test_decode_benchmark_runs(tmp_path):
    arguments = "--model tiny --context 300 --batch 1 2 --cycles 16 --accepted 5 --block-len 8"
    bench_decode.main([*arguments.split(), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode-tiny.json").read_text())["rows"]
    assert len(rows) == 12
    tokens = {"ar": 1, "two_pass": 6, "one_pass": 1 + 14 / 16 * 10 / 3}  # one of 6 blocks comes true in 14 of 16 cycles
    for row in rows:
        assert row["tokens_per_cycle"] == pytest.approx(tokens[row["mode"]], abs=0.1)
        assert row["peak_gb"] > 0 and (row["runtime"] == "orthrus_rt" or row["device_ms"] > 0)
