"""What does not fit into memory is reported before it is loaded."""

import logging
import os

import pytest
import torch

from bench.bench_row_linear import Chain
from orthrus_rt import room, transformers_model
from tests import checkpoints, engines

CPU = torch.device("cpu")
GB = 10**9
MEMINFO = "MemTotal:  24000000 kB\nMemFree: 1\nMemAvailable:  8000000 kB\nSwapFree:  1000000 kB\nOdd: x\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(checkpoints.make(tmp_path_factory.mktemp("tiny"), "qwen3", dtype=torch.bfloat16))


def host(root, **group):
    """A machine, and optionally the container that this process is in."""
    files = {"proc/meminfo": MEMINFO} | {f"sys/fs/cgroup/{name.replace('__', '.')}": group[name] for name in group}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("limit", "swap", "free"),
    [
        ("max", "max", 9216 * 10**6),
        ("90000000000", "max", 9216 * 10**6),
        ("4000000000", "0", 13 * 10**8),
        ("4000000000", "200000000", 14 * 10**8),
        ("4000000000", "max", 13 * 10**8 + 1024 * 10**6),
    ],
)
def test_what_a_container_can_give(tmp_path, limit, swap, free):
    """Its limit less what it uses, plus file pages that a disk backs, plus the swap that it may use and that exists."""
    group = dict(memory__max=f"{limit}\n", memory__current="3000000000\n", memory__swap__max=f"{swap}\n")
    group |= dict(memory__swap__current="100000000\n", memory__stat="file 500000000\nshmem 200000000\n")
    if swap == "0":
        group["memory__swap__current"] = "0\n"
    assert room.free_bytes(CPU, host(tmp_path, **group)) == free


def test_a_container_without_an_account_of_swap(tmp_path):
    """Its memory limit applies all the same."""
    group = dict(memory__max="4000000000", memory__current="3000000000", memory__stat="file 500000000\nshmem 200000000")
    assert room.free_bytes(CPU, host(tmp_path, **group)) == 13 * 10**8 + 1024 * 10**6


@pytest.mark.parametrize(
    "group",
    [
        {},
        {"memory__max": "1000"},
        {"memory__max": "1000", "memory__current": "?"},
        {"memory__max": "1000", "memory__current": "10", "memory__stat": "anon 5"},
    ],
)
def test_what_a_host_can_give(tmp_path, group):
    """Where a container's limit is not reported, or only in part."""
    assert room.free_bytes(CPU, host(tmp_path, **group)) == 9216 * 10**6


def test_what_a_gpu_can_give(monkeypatch):
    """What is free, and what torch keeps without using it."""
    for name, told in {"mem_get_info": (100, 999), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, told=told: told)
    assert room.free_bytes(torch.device("cuda", 0)) == 130


@pytest.mark.parametrize(
    ("quota", "threads", "wants"),
    [
        ("max 100000", 64, None),
        ("max 100000", 65, 64),
        ("400000 100000", 4, None),
        ("350000 100000", 4, None),
        ("350000 100000", 5, 3),
        ("20000 100000", 2, 1),
        ("9900000 100000", 80, 64),
        ("no numbers", 9, None),
        ("400000 0", 9, None),
    ],
)
def test_more_threads_than_there_is_time_for(tmp_path, monkeypatch, caplog, quota, threads, wants):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    root = host(tmp_path, cpu__max=f"{quota}\n")
    with caplog.at_level(logging.WARNING, "orthrus_rt"):
        room.check_threads(CPU, root)
        assert len(caplog.messages) == (wants is not None)
        if wants:
            assert f"threads as torch, {threads}, but" in caplog.text and f"set_num_threads({wants})" in caplog.text
        room.check_threads(torch.device("cuda", 0), root)
    assert len(caplog.messages) == (wants is not None)
    room.check_threads(CPU, tmp_path / "nowhere")  # a host without such groups
    assert len(caplog.messages) == (wants is not None) + (threads > 64)


def test_a_host_that_tells_nothing(tmp_path, monkeypatch, folder):
    assert room.free_bytes(CPU, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 24000000 kB\n")
    assert room.free_bytes(CPU, tmp_path) is None
    monkeypatch.setattr(room, "free_bytes", lambda _: None)
    engines.make(folder)


def test_weights_are_estimated_from_below(folder):
    for dtype in ("bfloat16", "float32"):
        engine = engines.make(folder, dtype=dtype)
        packed = sum(engine.model.nbytes()[name] for name in ("ar", "diffusion"))
        assert 0.7 * packed < room.least_weight_bytes(engine.config, CPU, engine.model.dtype) <= packed


@pytest.mark.parametrize("tied", (False, True))
def test_in_float32_the_estimate_is_exact(tmp_path, tied):
    """An embedding table counts if it is also the head."""
    engine = engines.make(str(checkpoints.make(tmp_path, "qwen3", tie_word_embeddings=tied)), dtype="float32")
    packed = sum(engine.model.nbytes()[name] for name in ("ar", "diffusion"))
    assert room.least_weight_bytes(engine.config, CPU, torch.float32) == packed


def test_what_fits_exactly_is_loaded(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    room.check_left("they", 1000, CPU, torch.float32)
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory: they in float32 take at least 0\.0 GB"):
        room.check_left("they", 1001, CPU, torch.float32)


def test_the_reference_may_multiply_by_what_lies_in_the_file(folder, monkeypatch):
    """On a GPU it cannot."""
    config = engines.make(folder).config
    assert room.least_weight_bytes(config, CPU, torch.float16) == 0
    monkeypatch.setattr(room.dispatch, "select", lambda *_: "reference")
    on_gpu = (room.least_weight_bytes(config, torch.device("cuda"), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert next(on_gpu) == 2 * next(on_gpu) > 0


def test_weights_that_do_not_fit_are_not_loaded(folder, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(room, "least_weight_bytes", lambda *_: 18 * GB)
    monkeypatch.setattr("orthrus_rt.weights.pack", lambda *_, **__: pytest.fail("loaded"))
    said = r"^out of memory: the weights of \S+ in bfloat16 take at least 18.0 GB, and cpu has 0.0 GB left$"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        engines.make(folder)


def test_a_benchmarks_weights_that_do_not_fit_are_not_drawn(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda _: 10 * GB)
    monkeypatch.setattr("bench.bench_row_linear.pack", lambda *_, **__: pytest.fail("drawn"))
    said = (
        r"^out of memory: 36 layers of 8b \(--layers for fewer\) in bfloat16 take at least [12]\d\.\d GB, and cpu has"
    )
    with pytest.raises(torch.OutOfMemoryError, match=said):
        Chain("8b", CPU, None, diff=False, baseline=True)


def test_a_copy_for_transformers_that_does_not_fit(folder, monkeypatch):
    """What is used as stored in the files needs no room. Norms may be stored in another dtype than the matrices."""
    checkpoint = engines.make(folder).checkpoint
    checkpoint.tensors = {n: t.float() if "norm" in n else t for n, t in checkpoint.tensors.items()}
    monkeypatch.setattr(room, "free_bytes", lambda _: 1000)
    transformers_model.build(checkpoint, dtype=torch.bfloat16)
    said = "^out of memory: the weights of transformers' model in float32 take at least 0.0 GB, and cpu has 0.0 GB left"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        transformers_model.build(checkpoint, dtype=torch.float32)


def test_a_cache_that_may_outgrow_the_memory_is_a_warning(folder, monkeypatch, caplog):
    monkeypatch.setattr(room, "least_weight_bytes", lambda *_: 0)
    need = engines.make(folder, max_seq_len=512).kv.nbytes
    with caplog.at_level(logging.WARNING, "orthrus_rt"):
        for free in (need, need - 1):
            assert not caplog.messages
            monkeypatch.setattr(room, "free_bytes", lambda _, free=free: free)
            engines.make(folder, max_seq_len=512)
    (message,) = caplog.messages
    assert message.startswith(
        "the cache of max_batch_size 8, num_pages 64, max_seq_len 512 may grow to 0.0 GB, and cpu"
    )
    assert message.endswith(": lower max_batch_size, num_pages or max_seq_len")
