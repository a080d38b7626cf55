"""What memory is used for, and what is reported when there is not enough of it."""

import sys
from functools import partial

import pytest
import torch

from orthrus_rt import huge_pages
from orthrus_rt.device import claim
from orthrus_rt.kv import PagedKvCache
from orthrus_rt.model import Workspace
from orthrus_rt.runner import Runner
from orthrus_rt.sampling import SamplingParams
from orthrus_rt.sizes import engine_sizes
from tests import checkpoints, engines, failing, poison

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("paced")]

GROWS_WITH_CONTEXT = {"kv_pages", "tables", "total"}
make = partial(engines.make, max_seq_len=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    return str(checkpoints.make(path, dtype=torch.bfloat16, diff_noise=0.05, max_position_embeddings=4096))


def warm_report(folder, **kwargs):
    engine = make(folder, **kwargs)
    engine.warmup()
    return engine.memory_report()


def test_only_the_cache_and_its_tables_grow_with_context(folder):
    short, long = (warm_report(folder, max_seq_len=n) for n in (512, 4096))
    assert {name for name in short if short[name] != long[name]} == GROWS_WITH_CONTEXT
    assert long["kv_pages"] - short["kv_pages"] == 8 * 56 * 64 * 2 * 2 * 2 * 64 * 2  # pages, layers, k/v, heads, bf16
    for report in (short, long):
        assert report["total"] == sum(v for k, v in report.items() if k != "total")


@pytest.mark.parametrize(("most", "want"), ((512, (512, 3, 24)), (131072, (4096, 3, 192))))
def test_sizes_by_default(most, want):
    assert engine_sizes(checkpoints.tiny_config(max_position_embeddings=most), None, 3, None) == want


@pytest.mark.parametrize("factor", (0.5, 1.0, 4, 1e308))
def test_linear_scaling_reaches_further_for_whoever_asks(factor):
    """Vicuna 16k states the 4096 positions that it starts from, other models state those that they stretch to."""
    config = checkpoints.tiny_config(rope_scaling={"type": "linear", "factor": factor}, max_position_embeddings=128)
    most = int(min(128 * max(1, factor), sys.maxsize))
    assert config.most_positions == most
    assert engine_sizes(config, None, 1, None).max_seq_len == 128
    if most < 2**31:
        assert engine_sizes(config, most, 1, None).max_seq_len == most
        with pytest.raises(ValueError, match=rf"max_seq_len must be within \[2, {most}\]"):
            engine_sizes(config, most + 1, 1, None)


def test_what_the_diffusion_view_adds(folder):
    """In addition to AR decoding: its weights, one layer's buffers of the block rows, the verified rows' choices."""
    ar, two_pass = (warm_report(folder, mode=mode) for mode in ("ar", "two_pass"))
    assert {name for name in ar if ar[name] != two_pass[name]} == {"scratch", "activations", "cycles", "total"}
    assert ar["scratch"] == 0
    config = make(folder).config
    slots, rows = 8, 8 * config.block_len
    attention = (4 + 2 * 2) * 64 * 64 + 64 * 4 * 64  # q, k, v and o of one layer
    plain = config.num_layers * attention * 2
    assert two_pass["weights_diffusion"] == sum(
        w.nbytes for layer in make(folder).model.layers for w in (layer.qkv_diff, layer.o_diff)
    )
    assert 0.5 * plain < two_pass["weights_diffusion"] < 0.55 * plain or two_pass["weights_diffusion"] == plain
    assert two_pass["scratch"] == 2 * rows * config.num_heads_kv * config.head_dim * 2
    hidden_and_normed, mlp = 2 * config.hidden_size, config.intermediate_size
    qkv_q_and_attn = (3 * config.num_heads_q + 2 * config.num_heads_kv) * config.head_dim
    per_row = (hidden_and_normed + qkv_q_and_attn + mlp) * 2
    partials = 1  # per row: 96 ids lie in one tile
    more = slots * (config.block_len - 1)  # rows in addition to those of ar and of prompts
    assert two_pass["activations"] - ar["activations"] == more * (per_row + partials * 8)  # value, id
    built = slots + 4 + 2 + 1  # slots of the cycles of all batch buckets
    picked = built * (2 * config.block_len - 1) * 4  # the indices of the rows that choose
    staged = 2 * (built * config.block_len * 16 + (built + 4) * 4)  # two passes' rows and where their groups start
    assert two_pass["cycles"] == picked + staged


def test_all_cycles_share_the_memory_of_their_choices(folder):
    activations = make(folder).runner.activations
    for of in ("logits", "scores"):
        first, second = (activations.partials(n, of) for n in (1, 2))
        assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]


def test_a_workspace_begins_as_zeros(folder, monkeypatch):
    """That of row_linear, whose counters every launch leaves at zero."""
    model = make(folder).model
    head = (model.lm_head.in_features, model.lm_head.out_features)
    monkeypatch.setattr("orthrus_rt.native.row_linear_workspace_bytes", lambda *args: 4096 * (head in args[-1]))
    monkeypatch.setattr(torch, "empty", lambda n, **how: torch.full((n,), 7, **how))
    workspace = Workspace.allocate(model, max_rows=4, max_seq_len=64)
    assert workspace.linear.nbytes == 4096 and not workspace.linear.any() and workspace.graph_pool is None


def test_a_workspace_that_nothing_needs(folder, monkeypatch):
    """On a card it still has the pool of all recordings."""
    model = make(folder).model
    monkeypatch.setattr("orthrus_rt.native.row_linear_workspace_bytes", lambda *_: 0)
    monkeypatch.setattr("orthrus_rt.native.dual_attn_workspace_bytes", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    model.device = torch.device("cuda:0")
    assert Workspace.allocate(model, max_rows=4, max_seq_len=64) == Workspace(None, None, "pool")


def test_the_workspace_of_a_card(folder):
    engine = make(folder)
    engine.runner.workspace.linear = torch.empty(1000, dtype=torch.uint8)
    engine.runner.workspace.attn = torch.empty(30, dtype=torch.uint8)
    assert engine.memory_report()["workspace"] == 1030


@pytest.mark.parametrize("where", ("model", "runner", "cpu", "cublas", "kernel"))
def test_out_of_memory_names_the_knobs(folder, monkeypatch, where):
    def exhausted(*_, **__):
        if where == "cpu":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        if where == "cublas":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        if where == "kernel":
            raise MemoryError("std::bad_alloc")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    knobs = r"lower max_batch_size, num_pages or max_seq_len \(.*(2.00 GiB|allocate memory|ALLOC_FAILED|bad_alloc).*\)$"
    monkeypatch.setattr(*((Runner, "__init__") if where == "runner" else ("orthrus_rt.weights.pack",)), exhausted)
    sizes = "making an engine of max_batch_size 8, num_pages 64, max_seq_len 512: "
    with pytest.raises(torch.OutOfMemoryError, match=sizes + knobs):
        make(folder)


KNOBS = {"two_pass": "draft_len, max_batch_size", "one_pass": "draft_len, fan_out, max_batch_size"}


@pytest.mark.parametrize("mode", KNOBS)
def test_cycles_that_are_too_large_name_what_makes_their_rows(folder, monkeypatch, mode):
    engine = make(folder, mode="ar")
    monkeypatch.setattr("orthrus_rt.runner.Activations", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(torch.OutOfMemoryError, match=f"rows a pass: lower {KNOBS[mode]}, num_pages or max_seq_len"):
        engine.generate([1], mode=mode, fan_out=9 if mode == "one_pass" else None)


@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass"))
@pytest.mark.parametrize("kind", (poison.GREEDY, poison.SAMPLED), ids=("greedy", "sampled"))
def test_cycles_that_find_no_memory_for_their_recording_run_op_by_op(folder, mode, kind):
    failing.check_recordings_without_memory(make(folder, mode=mode), poison.jobs_of([kind], count=4))


@pytest.mark.parametrize("lacking", failing.AT_THE_START)
def test_who_finds_no_memory_at_the_start_costs_the_others_nothing(folder, alone, lacking):
    failing.check_refused_at_the_start(lambda: make(folder, max_batch_size=5), alone, lacking)


def test_large_weights_have_huge_pages_of_their_own():
    """Their blocks are freed with them; small weights share one."""
    large = huge_pages.empty([huge_pages.arena.BLOCK], torch.uint8)
    small = [huge_pages.empty([100], torch.bfloat16) for _ in range(2)]
    blocks = [t.untyped_storage().data_ptr() for t in (large, *small, huge_pages.arena.block)]
    assert blocks[0] not in blocks[1:] and blocks[2] == blocks[3]
    assert huge_pages.arena.block.untyped_storage().nbytes() < 2 * huge_pages.arena.BLOCK
    assert all(t.data_ptr() % 64 == 0 for t in small) and large.data_ptr() % (2 << 20) == 0


def test_a_large_cache_has_huge_pages():
    config = checkpoints.tiny_config()
    page_bytes = config.num_layers * 2 * config.num_heads_kv * 64 * config.head_dim * 2
    sizes = dict(num_slots=1, max_seq_len=64, num_pages=huge_pages.arena.BLOCK // page_bytes + 1)
    kv = PagedKvCache(config, device=torch.device("cpu"), dtype=torch.bfloat16, **sizes)
    assert kv.pages.is_contiguous() and kv.pages.data_ptr() % (2 << 20) == 0


def test_other_errors_pass_unchanged(folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr("orthrus_rt.weights.pack", broken)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        make(folder)


def test_one_engine_per_cuda_device_and_any_number_on_the_cpu():
    class Fake:
        closed = False

    first, second, device = Fake(), Fake(), torch.device("cuda:7")
    claim(device, first)
    claim(torch.device("cuda:6"), second)
    with pytest.raises(RuntimeError, match=r"cuda:7 has a live engine in this process; close\(\) it first"):
        claim(device, second)
    first.closed = True
    claim(device, second)
    second.itself = second  # a reference cycle, as between an engine and its metrics: only the collector frees it
    del second
    claim(device, first)
    claim(torch.device("cpu"), first)
    claim(torch.device("cpu"), Fake())


def test_whoever_comes_behind_one_without_memory_begins_in_the_same_step(folder, monkeypatch):
    engine, params = make(folder), SamplingParams(max_new_tokens=20, ignore_eos=True)
    begin = engine.runner.begin
    monkeypatch.setattr(engine.runner, "begin", lambda r: failing.exhausted() if r.prompt == [6, 6] else begin(r))
    _, good = engine.submit([6, 6], params), engine.submit([1, 2], params)
    engine.step()
    assert [r.request_id for r in engine.scheduler.active] == [good]
