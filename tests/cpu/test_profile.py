"""The profile: it times the very cycle that runs, and the bytes it reports are those of the contracts."""

import importlib
import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import common
from orthrus_rt import dispatch, profile, prompts, rates
from orthrus_rt import state as st
from orthrus_rt.cycle import Cycle
from orthrus_rt.cycle_plan import MODES
from orthrus_rt.dry_run import dry_cycles
from orthrus_rt.profile import calls_of
from orthrus_rt.sampling import SamplingParams
from tests import byte_tokenizer, engines, failing

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

SLOTS, CONTEXT, LAYERS, K = 2, 70, 2, 8
make = partial(engines.make, max_seq_len=128, max_batch_size=4)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float16"))
def test_the_calls_are_the_cycle(folder, dtype):
    """Run one by one, they leave the same state and cache as the cycle itself, whether or not a tape takes them."""
    left = []
    for by_calls in (False, True):
        engine = make(folder, dtype=dtype)
        plan = engine.make_plan("two_pass")
        with torch.inference_mode(), dry_cycles(engine, [plan], SLOTS, CONTEXT) as start:
            cycle = start(plan)
            if by_calls:
                calls = calls_of(cycle.run_eager)
                start(plan)
                for call in calls:
                    call.run()
            else:
                cycle.run()
            state = engine.runner.state
            assert int(state.num_output.sum()) >= SLOTS  # tokens emitted
            left.append([t.clone() for t in (*vars(state).values(), engine.kv.pages)])
        assert engine.kv.num_free_pages == engine.kv.num_pages
        engine.generate([1, 2, 3])  # and the engine goes on
    state, pages = left[0][:-1], left[0][-1]
    assert all(torch.equal(a, b) for a, b in zip(state, left[1][:-1], strict=True))
    assert torch.equal(pages[:, :, 1:5].view(torch.uint8), left[1][-1][:, :, 1:5].view(torch.uint8))


def test_calls_of_other_threads_are_not_taken(folder):
    """They run, so an engine of another thread goes on decoding."""
    other = make(folder)
    want = other.generate([1, 2, 3]).token_ids
    with ThreadPoolExecutor(1) as pool:
        got = []
        calls = calls_of(lambda: got.append(pool.submit(other.generate, [1, 2, 3]).result(60).token_ids))
    assert got == [want] and calls == []


def test_calls_and_bytes(folder):
    engine = make(folder)
    facts, rows = profile.profile(engine, mode="two_pass", batch=SLOTS, context=CONTEXT, repeats=2)
    by_op = {row["op"]: row for row in rows}
    assert facts["mode"] == "two_pass" and facts["block_len"] == K and facts["read_gb_s"] > 0
    counts = {op: row["calls"] for op, row in by_op.items()}
    linears = {"64 x 512": 1, "256 x 64": 1, "64 x 256": 1, "128 x 64": 1}  # qkv, o, gate and up, down
    assert counts == {
        **{f"row_linear {shape}": 2 * LAYERS * n for shape, n in linears.items()}, "row_linear 64 x 96": 2,
        "rms_norm": 2 * (2 * LAYERS + 1), "qkv_commit": 2 * LAYERS, "dual_attn": 2 * LAYERS, "embed": 2, "consensus": 3,
    }  # fmt: skip
    rows_each = SLOTS * K
    qkv = sum(layer.qkv.nbytes + layer.qkv_diff.read_bytes(exact=False) for layer in engine.model.layers)
    qkv += 2 * LAYERS * 2 * rows_each * (64 + 512)  # two passes, layers, bf16: in and out
    assert by_op["row_linear 64 x 512"]["mbytes"] == pytest.approx(qkv * 1e-6)
    cache = 2 * 2 * 64 * 2  # a position's keys and values in a layer: k/v, heads, head_dim, bf16
    draft = SLOTS * (CONTEXT + K) * cache  # the draft pass sees the context, and its own block in the scratch
    verify = SLOTS * (CONTEXT + K) * cache
    queries = 2 * 2 * rows_each * 4 * 64 * 2  # passes, in and out
    assert by_op["dual_attn"]["mbytes"] == pytest.approx(LAYERS * (draft + verify + queries) * 1e-6)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    for row in rows:
        assert row["gb_s"] == pytest.approx(row["mbytes"] / row["us"] * 1e3)
        assert row["of_read"] == pytest.approx(row["gb_s"] / facts["read_gb_s"])
        assert math.isfinite(row["in_cycle_us"])
    assert sum(row["us"] for row in rows) == pytest.approx(facts["ops_us"])


def test_the_cycle_is_timed_without_each_op(folder, monkeypatch):
    """The replay lacks exactly the calls of that name; the cycle's own recording is as before."""
    engine = make(folder)
    plan = engine.make_plan("one_pass")
    with torch.inference_mode(), dry_cycles(engine, [plan], SLOTS, CONTEXT) as start:
        cycle, reset = start(plan), partial(start, plan)
        cycle.run()
        own = cycle._replay
        counts = Counter(call.name for call in calls_of(cycle.run_eager))

        def timed(runs, device, *, repeats, reset):
            whole, again, without = runs
            assert whole == cycle.run and again is reset and repeats == 3
            left.append(len(own.args[0]) - len(without.args[0]))
            return [[10, 30, 20], [0] * 3, [4, 9, 5]]

        left = []
        monkeypatch.setattr(profile, "time_each", timed)
        for name in counts:
            assert profile.shorter_by(cycle, name, 3, reset) == 15  # the median of 6, 21 and 15
        assert left == list(counts.values()) and cycle._replay is own
        monkeypatch.setattr(Cycle, "make_recording", failing.exhausted)
        assert profile.shorter_by(cycle, "embed", 3, reset) is None
        cycle.op_by_op = True
        monkeypatch.undo()
        assert profile.shorter_by(cycle, "embed", 3, reset) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 5}, r"batch must be within \[1, 4\] \(max_batch_size\), got 5"),
        ({"mode": "auto"}, "mode must be one of ar, two_pass, one_pass, repeats >= 1, got auto, 10"),
        ({"repeats": 0}, "got two_pass, 0"),
        ({"context": 121}, r"context must be within \[1, 120\] \(max_seq_len less a block\), got 121"),
    ],
)
def test_what_does_not_fit_is_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        profile.profile(make(folder), **{"mode": "two_pass", **arguments})


def test_a_sequence_that_is_no_longer_than_a_block(folder):
    engine = make(folder, max_seq_len=8)
    with pytest.raises(ValueError, match=r"max_seq_len must be above 8 \(a block\), got 8"):
        profile.profile(engine, mode="two_pass", context=1)


def test_too_few_pages(folder):
    engine = make(folder, num_pages=5)
    with pytest.raises(ValueError, match=r"batch 4 with context 100 does not fit: KV cache: slot 2 needs 2 more pages"):
        profile.profile(engine, mode="two_pass", batch=4, context=100)
    assert len(engine.generate([1, 2, 3], SamplingParams(8, ignore_eos=True)).token_ids) == 8
    assert engine.kv.num_free_pages == engine.kv.num_pages


def test_a_busy_engine_is_refused_and_goes_on(folder):
    engine, params = make(folder), SamplingParams(24, ignore_eos=True)
    want = engine.generate([1, 2, 3], params)
    for steps in (0, 2):  # waiting, running
        request_id, tokens = engine.submit([1, 2, 3], params), []
        for _ in range(steps):
            tokens += [token for out in engine.step() for token in out.new_token_ids]
        with pytest.raises(RuntimeError, match="profile: the engine must be idle"):
            profile.profile(engine, mode="two_pass", context=20, repeats=1)
        while engine.has_unfinished():
            tokens += [token for out in engine.step() for token in out.new_token_ids]
        assert tokens == want.token_ids and not engine.is_unfinished(request_id)
    engine.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        profile.profile(engine, mode="ar")


def test_an_interrupted_profile_leaves_a_whole_engine(folder, monkeypatch):
    engine = make(folder)
    want = engine.generate([1, 2, 3])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile.profile(engine, mode="two_pass", context=20)
    assert engine.torn and engine.generate([1, 2, 3]).token_ids == want.token_ids
    assert not engine.torn and engine.kv.num_free_pages == engine.kv.num_pages


@pytest.mark.parametrize("fan_out", (1, 6, 3 * (K - 1) + 1))
def test_every_row_of_a_staged_one_pass_cycle_is_valid(folder, fan_out):
    """Each time it runs, and up to the largest context: it is a cycle in the middle of decoding, not the first one."""
    engine = make(folder)
    plan = engine.make_plan("one_pass", fan_out=fan_out)
    with torch.inference_mode(), dry_cycles(engine, [plan], SLOTS, engine.max_seq_len - 2 * K) as start:
        for _ in range(2):
            cycle = start(plan)
            cycle.stage_first()
            rows = cycle.passes[0].rows
            assert rows.num_rows == SLOTS * K * (1 + fan_out) and int(rows.position.min()) >= 0
            assert int(rows.position.max()) < engine.max_seq_len
            assert bool((engine.runner.state.hypotheses[:SLOTS, :fan_out, 0] >= 0).all())
            cycle.run()
    with pytest.raises(ValueError, match=r"within \[1, 112\] \(max_seq_len less two blocks\), got 113"):
        profile.profile(engine, mode="one_pass", context=113)


def test_bytes_of_counting_tokens():
    state = st.SlotState.allocate(3, K, 64, 1, "cpu")
    edits = st.SlotEdits.allocate(4, 96, 1, state.stop_ids)
    state.num_output[:] = torch.tensor([5, 0, 200])
    edits.num_counted[:] = torch.tensor([2, 0, 100, 7])
    assert set(profile.NBYTES) == set(dispatch.OPS)
    assert profile.NBYTES["count_tokens"](state, edits) == 3 * 3 * 4 + 3 * 4 * (3 + 64)


def encoded(engine, count: int) -> list[list[int]]:
    return [p.encode(engine.tokenizer) for p in prompts.load("data")[:count]]


@pytest.mark.parametrize("mode", MODES)
def test_rates_build_no_cycle_by_the_clock(tmp_path, monkeypatch, mode):
    engine = make(str(byte_tokenizer.make_checkpoint(tmp_path)), max_seq_len=512)
    ids = encoded(engine, 3)
    rates._warm(engine, ids, {"mode": mode})
    assert {cycle.state.num_slots for cycle in engine.runner._cycles.values()} == {1, 2, 4}
    assert all(cycle.settled for cycle in engine.runner._cycles.values())
    monkeypatch.setattr("orthrus_rt.runner.Cycle", None)  # nothing is built from here on
    params = [SamplingParams(n, ignore_eos=True) for n in (4, 30, 60)]
    assert [len(out.token_ids) for out in engine.generate(ids, params, mode=mode)] == [4, 30, 60]


def test_rates_are_those_of_the_generations(tmp_path):
    engine = make(str(byte_tokenizer.make_checkpoint(tmp_path)), max_seq_len=512, max_batch_size=2)
    rows = rates.decode_rates(engine, {"data": encoded(engine, 3)}, ("ar", "two_pass"), max_new_tokens=8)
    assert [(r["kind"], r["mode"], r["block_len"], r["prompts"], r["batch"]) for r in rows] == [
        ("data", "ar", 1, 3, 2), ("data", "two_pass", 8, 3, 2)
    ]  # fmt: skip
    ar, two_pass = rows
    assert ar["tokens"] == two_pass["tokens"] and ar["tokens_per_cycle"] == 1 <= two_pass["tokens_per_cycle"]
    assert all(r["tok_s"] > 0 and 0 < r["ms_per_cycle"] < 1e3 * r["tokens"] / r["tok_s"] for r in rows)


def test_rates_of_auto_count_the_cycles_of_every_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = str(byte_tokenizer.make_checkpoint(tmp_path / "model"))
    engine = make(path, mode="auto", max_seq_len=512, max_batch_size=1)
    engine.metrics.times = {"ar_cycle": (3, 0.5), "one_pass_cycle": (2, 0.25), "prefill": (9, 9.0), "recording": (9, 9)}
    assert rates._cycles(engine) == (5, 0.75)
    (row,) = rates.decode_rates(engine, {"data": encoded(engine, 1)}, ("auto",), fan_out=2, max_new_tokens=8)
    assert (row["mode"], row["block_len"], row["batch"], row["tokens"]) == ("auto", 8, 1, 8) and row["ms_per_cycle"] > 0


def test_rates_leave_out_what_ran_before(tmp_path):
    engine = make(str(byte_tokenizer.make_checkpoint(tmp_path)), max_seq_len=512)
    engine.metrics.times = {"ar_cycle": (3, 1e6)}
    (row,) = rates.decode_rates(engine, {"data": encoded(engine, 1)}, ("ar",), max_new_tokens=8)
    assert 0 < row["ms_per_cycle"] < 1e3 * row["tokens"] / row["tok_s"]


def test_rates_where_prompts_need_no_cycle_and_where_they_do(tmp_path, monkeypatch):
    engine, warmed = make(str(byte_tokenizer.make_checkpoint(tmp_path)), max_seq_len=512, max_batch_size=2), []
    monkeypatch.setattr(rates, "_warm", lambda engine, ids, options: warmed.append(options["mode"]))
    (row,) = rates.decode_rates(engine, {"data": encoded(engine, 1)}, ("ar",), max_new_tokens=1)
    assert (row["batch"], row["tokens"], row["tokens_per_cycle"], row["ms_per_cycle"]) == (1, 1, 0, 0)
    counts = iter([(1, 0.5), (5, 2.5)])
    monkeypatch.setattr(rates, "_cycles", lambda engine: next(counts))
    (row,) = rates.decode_rates(engine, {"data": encoded(engine, 1)}, ("two_pass",), max_new_tokens=4)
    assert row["ms_per_cycle"] == 500 and warmed == ["ar", "two_pass"]


@pytest.mark.parametrize(("mode", "asked", "warms"), [("auto", "auto", 1), ("auto", "ar", 0), ("ar", "auto", 0)])
def test_rates_of_an_engines_own_auto_are_behind_its_warm_up(tmp_path, monkeypatch, mode, asked, warms):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = make(str(byte_tokenizer.make_checkpoint(tmp_path / "model")), mode=mode, max_seq_len=512)
    warmed = []
    monkeypatch.setattr(engine, "warmup", lambda: warmed.append(engine.mode))
    rates._warm(engine, [[1, 2, 3]], {"mode": asked})
    assert len(warmed) == warms


SCRIPTS = sorted(p.stem for p in Path(__file__).parents[2].glob("bench/bench_*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_takes_no_results_is_refused_before_measuring(tmp_path, monkeypatch, capsys, script):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", [script, "--out", str(file)])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"bench.{script}").main()
    assert f"argument --out: must be a folder that can be written to, got '{file}' (" in capsys.readouterr().err


def test_the_folder_for_results_is_made(tmp_path):
    out = common.out_folder(str(tmp_path / "a" / "b"))
    assert Path(out).is_dir() and not list(Path(out).iterdir())
    common.report("name", {}, [{"x": 1}], out)
    assert {path.name for path in Path(out).iterdir()} == {"name.json", "name.md"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows", "0"], "--rows: must be a whole number > 0, got '0'"),
        (["--rows", "1.5"], "--rows: must be a whole number > 0, got '1.5'"),
        (["--rate", "nan"], "--rate: must be a number > 0, got 'nan'"),
        (["--tokens", "1"], "--tokens: must be a whole number >= 2 and <= 9, got '1'"),
        (["--tokens", "10"], "--tokens: must be a whole number >= 2 and <= 9, got '10'"),
        (["--out", ""], "--out: must be a folder, got nothing"),
    ],
)
def test_numbers_that_a_benchmark_has_no_use_for(capsys, given, message):
    parser = common.parser_of("")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--tokens", type=int, least=2, most=9)
    assert parser.parse_args(["--rows", "1", "--rate", "0.5", "--tokens", "9"]).tokens == 9
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_a_script_whose_options_do_not_fit(capsys):
    def main():
        raise ValueError("draft_len must be\n3, got 4")

    with pytest.raises(SystemExit, match=r"^[\w.-]+: draft_len must be 3, got 4$"):
        common.run_script(main)
    with pytest.raises(SystemExit, match="2"):
        common.parser_of("", device="cpu").parse_args(["--dev", "cpu"])  # no abbreviations: reports quote the command
    assert "unrecognized arguments: --dev cpu" in capsys.readouterr().err
