"""The decode benchmark's own logic: baselines give the engine's tokens, simulated acceptance is as stated."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from bench import bench_decode, decode_cases
from bench.acceptance import mean_accepted, one_pass_trace, per_position, simulated, trace
from bench.baselines import GrowingCache, StaticCache, Weights, generate
from bench.models import config_of
from orthrus_rt import checkpoint, dispatch
from orthrus_rt.dry_run import dry_cycles
from orthrus_rt.profile import calls_of
from orthrus_rt.sampling import SamplingParams
from tests import byte_tokenizer, checkpoints, engines

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [53, 58, 9], [7]]
TOKENS = 30
CYCLES = {"qwen3": 56, "llama": 64}  # of the 87 tokens after the first ones


@pytest.fixture(scope="module", params=("qwen3", "llama"))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    untied = {"tie_word_embeddings": False} if request.param == "llama" else {}
    return str(checkpoints.make(path, request.param, diff_noise=0.02, **untied))


@pytest.mark.parametrize("mode", ("ar", "two_pass"))
@torch.inference_mode()
def test_baselines_give_the_engines_tokens_and_cycles(folder, mode):
    engine = engines.make(folder, dtype="float32", max_seq_len=128, mode=mode)
    outs = [engine.generate(p, SamplingParams(TOKENS, ignore_eos=True)) for p in PROMPTS]
    want = [out.token_ids for out in outs]
    if mode == "two_pass":
        assert sum(out.stats.cycles for out in outs) == CYCLES[engine.config.family]
    loaded = checkpoint.load(folder)
    for fused in (False, True):
        weights = Weights(loaded, "cpu", torch.float32, 128, fused=fused)
        for prompt, out in zip(PROMPTS, outs, strict=True):
            for baseline in (GrowingCache(weights, mode, 7), StaticCache(weights, mode, 7, 1, 64)):
                (tokens,), cycles = generate(baseline, [prompt], TOKENS)
                assert tokens == out.token_ids and cycles == out.stats.cycles
    together = StaticCache(weights, mode, 7, 3, 300)
    assert generate(together, PROMPTS, TOKENS)[0] == want


def test_forced_acceptance_of_the_baselines(folder):
    weights = Weights(checkpoint.load(folder), "cpu", torch.float32, 256, fused=True)
    with torch.inference_mode():
        for baseline in (GrowingCache(weights, "two_pass", 7), StaticCache(weights, "two_pass", 7, 1, 256)):
            baseline.place(20)
            assert [len(baseline.cycle([a])[0]) for a in (0, 7, 3, 9)] == [1, 8, 4, 8]
            assert int(baseline.n) == 20 + 21


@pytest.mark.parametrize(("mean", "draft_len"), [(0.0, 7), (3.0, 7), (9.7, 31), (7.0, 7)])
def test_a_trace_accepts_what_it_states(mean, draft_len):
    accepted = trace(mean, draft_len, 64, 3)
    assert accepted.shape == (64, 3) and int(accepted.min()) >= 0 and int(accepted.max()) <= draft_len
    assert accepted.float().mean(0).tolist() == pytest.approx([mean] * 3, abs=0.1)
    assert mean in (0, draft_len) or not torch.equal(accepted[:, 0], accepted[:, 1])
    assert mean_accepted(per_position(mean, draft_len), draft_len) == pytest.approx(mean, abs=1e-6)
    with pytest.raises(ValueError, match=r"accepted drafts per cycle must be within \[0, 7\] \(draft_len\), got 8"):
        trace(8, 7, 64, 1)


def test_a_trace_of_one_pass_accepts_where_blocks_came_true():
    accepted = one_pass_trace(4.0, 7, 0.75, 64, 3)
    assert accepted.float().mean(0).tolist() == pytest.approx([3.0] * 3, abs=0.1)
    assert not torch.equal(accepted[:, 0], accepted[:, 1])
    assert not one_pass_trace(4.0, 7, 0.0, 64, 3).any()
    assert torch.equal(one_pass_trace(4.0, 7, 1.0, 64, 1).sort(0)[0], trace(4.0, 7, 64, 1).sort(0)[0])


@pytest.mark.native
@pytest.mark.parametrize("mode", ("two_pass", "one_pass"))
def test_simulated_cycles_accept_by_the_trace_and_do_the_same_work(tmp_path, mode):
    folder = str(checkpoints.make(tmp_path, dtype=torch.bfloat16))
    drawn = torch.tensor([[0, 7], [3, 1], [7, 0]], dtype=torch.int32)
    params, lengths, calls = SamplingParams(max_new_tokens=60, ignore_eos=True), [], []
    with torch.inference_mode():
        for context in (contextlib.nullcontext(), simulated(drawn)):
            engine = engines.make(folder, max_seq_len=128, max_batch_size=2, mode=mode)
            plan = engine.make_plan(mode)
            with context, dry_cycles(engine, [plan], 2, 40) as start:
                calls.append([(call.name, call.nbytes()) for call in calls_of(start(plan).run_eager)])
    assert calls[0] == calls[1]  # the same ops over as many bytes
    with simulated(drawn):
        engine = engines.make(folder, max_seq_len=128, max_batch_size=2, mode=mode)
        ids = [engine.submit(p, params) for p in PROMPTS[:2]]
        engine.step()
        for _ in range(3 if mode == "one_pass" else 0):
            engine.step()  # its drafts are those that the first one made: none
        for _ in range(6):
            out = {o.request_id: len(o.new_token_ids) for o in engine.step()}
            lengths.append([out[i] for i in ids])
    assert lengths == (drawn + 1).tolist() * 2


def test_fewer_drafts_accept_fewer(monkeypatch):
    """The default is the published models' 31 drafts, cut to as many as there are."""
    assert mean_accepted(per_position(1 - 2.0**-31, 31), 3) == pytest.approx(1 / 2 + 1 / 4 + 1 / 8)
    monkeypatch.setattr("bench.common.read_bandwidth", lambda _: 1.0)
    shared = {"model": "8b", "device": torch.device("cpu"), "block_len": 32, "cycles": 8}
    shared |= {"modes": ("ar", "two_pass"), "batch": [1], "context": [512]}
    accepted = [
        bench_decode.Bench(SimpleNamespace(draft_len=draft_len, accepted=given, **shared)).accepted
        for draft_len, given in ((None, None), (7, None), (7, 2.5))
    ]
    assert accepted == [pytest.approx(9.7), pytest.approx(4.9, abs=0.1), 2.5]
    with pytest.raises(ValueError, match="positions are needed, and the model has 40960"):
        bench_decode.Bench(SimpleNamespace(**shared | {"context": [40_900], "draft_len": None, "accepted": None}))


@pytest.mark.native
def test_rows_of_an_official_shape(tmp_path, capsys):
    arguments = "--model tiny --device cpu --context 300 --batch 1 2 --cycles 16 --accepted 5 --block-len 8"
    bench_decode.main([*arguments.split(), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "decode-tiny.json").read_text())
    rows = report["rows"]
    assert report["header"]["command"] == f"python -m bench.bench_decode {arguments} --out DIR"
    assert report["header"]["isa"] == dispatch.extension().cpu.isa()
    assert f"- isa: {dispatch.extension().cpu.isa()}\n" in (tmp_path / "decode-tiny.md").read_text()
    cases = [(r["runtime"], r["mode"], r["batch"]) for r in rows]
    modes = ("ar", "two_pass")
    assert cases == [
        *(("orthrus_rt", mode, batch) for batch in (1, 2) for mode in (*modes, "one_pass")),
        *(("baseline eager", mode, 1) for mode in modes),
        *(("baseline graphed", mode, batch) for batch in (1, 2) for mode in modes),
    ]
    floors = {r["mode"]: r["floor_ms"] for r in rows[:3]}
    assert floors["ar"] < floors["one_pass"] < floors["two_pass"] < 2 * floors["one_pass"]
    says = {"ar": "none (ar)", "two_pass": "simulated acceptance a=5"}
    says["one_pass"] = "simulated acceptance a=3.33 where a block came true, 76%"
    tokens = {"ar": 1, "two_pass": 6, "one_pass": 1 + 0.75 * 10 / 3}  # in 12 of 16 cycles a block comes true
    for row in rows:
        assert row["acceptance"] == says[row["mode"]] and row["fan_out"] == (2 if row["mode"] == "one_pass" else 0)
        assert row["tokens_per_cycle"] == pytest.approx(tokens[row["mode"]], abs=0.1)
        assert row["tok_s"] == pytest.approx(row["batch"] * row["tokens_per_cycle"] / row["ms_per_cycle"] * 1e3)
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_cycle"]) and row["floor_ms"] > 0
    own = {r["batch"]: r["tok_s"] for r in rows[:4] if r["mode"] == "ar"}
    assert all(r["over_ar"] == pytest.approx(r["tok_s"] / own[r["batch"]]) for r in rows)


@pytest.mark.parametrize(("coded", "expected"), [(False, (4, 10, 9)), (True, (3, 6, 5.5))])
def test_floors(coded, expected):
    """A pass that only drafts reads 8 bits of each coded weight, of 12, and the diffusion view's weights have 8. Every
    pass reads the cache.
    """
    config = config_of("tiny")
    weight_bytes = {("",): 4.0, ("_diff",): 6.0, ("", "_diff"): 9.0}.get
    bench = SimpleNamespace(config=config, bandwidth=1e-6, weight_bytes=weight_bytes)
    for batch, context in ((0, 0), (3, 100)):
        cache = batch * context * config.num_layers * 2 * config.num_heads_kv * config.head_dim * 2
        for mode, weights, passes in zip(("ar", "two_pass", "one_pass"), expected, (1, 2, 1), strict=True):
            got = decode_cases.Bench.floor_ms(bench, mode, batch, context, coded)
            assert got == pytest.approx(weights + passes * cache)


@pytest.mark.native
def test_a_row_is_the_median_of_its_rounds(tmp_path, monkeypatch):
    """Modes alternate, and the median is by the time of a cycle."""
    times, modes = iter([5.0, 9.0, 1.0, 7.0, 3.0, 8.0]), []

    def simulated_row(bench, batch, context, mode):
        modes.append(mode)
        return bench.row("orthrus_rt", mode, batch, context, next(times) * 1e-3, 1.0)

    monkeypatch.setattr(bench_decode, "simulated_row", simulated_row)
    arguments = "--model tiny --device cpu --modes ar two_pass --baselines --rounds 3"
    bench_decode.main([*arguments.split(), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode-tiny.json").read_text())["rows"]
    assert modes == ["ar", "two_pass"] * 3 and [r["ms_per_cycle"] for r in rows] == [3.0, 8.0]


@pytest.mark.native
def test_kernels_are_timed_when_all_rows_are(tmp_path, monkeypatch):
    """This holds for every baseline's row, as the profiler slows down whatever runs after it."""
    order = []

    def measured(*args):
        order.append("row")
        return baseline_row(*args)

    def device_ms(bench, name, weights, batch, case, mode):
        order.append("device_ms")
        return {"eager": 1.0, "graphed": 2.0}[name] + 10 * batch + 100 * (mode == "ar")

    baseline_row = bench_decode.baseline_row
    monkeypatch.setattr(bench_decode, "baseline_row", measured)
    monkeypatch.setattr(bench_decode, "device_ms", device_ms)
    monkeypatch.setattr(bench_decode.Bench, "profiles", True)
    arguments = "--model tiny --device cpu --modes ar two_pass --context 64 --batch 1 2 --cycles 2"
    bench_decode.main([*arguments.split(), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode-tiny.json").read_text())["rows"]
    baselines = {(r["runtime"][9:], r["batch"], r["mode"]): r["device_ms"] for r in rows if "device_ms" in r}
    assert order == ["row"] * 6 + ["device_ms"] * 6
    assert baselines == {
        ("eager", 1, "ar"): 111, ("eager", 1, "two_pass"): 11, ("graphed", 1, "ar"): 112,
        ("graphed", 1, "two_pass"): 12, ("graphed", 2, "ar"): 122, ("graphed", 2, "two_pass"): 22,
    }  # fmt: skip


@pytest.mark.native
def test_a_row_that_fails_loses_none_of_those_before_it(tmp_path, monkeypatch):
    def simulated_row(bench, batch, context, mode):
        if context == 128:
            raise RuntimeError("an illegal memory access was encountered")
        return bench.row("orthrus_rt", mode, batch, context, 1e-3, 1.0)

    monkeypatch.setattr(bench_decode, "simulated_row", simulated_row)
    arguments = "--model tiny --device cpu --modes ar --context 64 128 --baselines"
    with pytest.raises(RuntimeError, match="illegal"):
        bench_decode.main([*arguments.split(), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "decode-tiny.json").read_text())["rows"]
    assert [row["context"] for row in rows] == [64]


@pytest.mark.native
def test_rows_of_a_model_that_accepts_by_itself(tmp_path, monkeypatch):
    folder = str(byte_tokenizer.make_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(decode_cases.common, "EMBEDDED_NAME", folder)
    arguments = f"--model {folder} --device cpu --batch 1 2 --kinds math --num-prompts 2 --tokens 12"
    monkeypatch.setattr(bench_decode.Bench, "max_seq_len", 512)
    bench_decode.main([*arguments.split(), "--out", str(tmp_path)])
    (path,) = tmp_path.glob("decode-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [r["runtime"] for r in rows] == ["orthrus_rt"] * 6 + ["baseline eager"] * 2 + ["baseline graphed"] * 2
    for row in rows:
        assert row["acceptance"] == ("none (ar)" if row["mode"] == "ar" else "real") and row["kind"] == "math"
    assert rows[1]["tokens_per_cycle"] == rows[4]["tokens_per_cycle"] >= rows[2]["tokens_per_cycle"] >= 1


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_does_not_fit_is_left_out(kind, capsys):
    def too_large(_, batch):
        raise kind("CUDA out of memory")

    assert bench_decode.attempt(too_large, None, 64) is None
    assert capsys.readouterr().out == "does not fit: 64: CUDA out of memory\n"
