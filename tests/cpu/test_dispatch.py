"""Which implementation runs which op, and what is said where it is not the first choice."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orthrus_rt import dispatch
from orthrus_rt.cli import main


def test_a_second_choice_is_a_warning(monkeypatch, caplog):
    cuda = torch.device("cuda", 7)
    module = SimpleNamespace(cuda=None, build_info=lambda: {"cuda_archs": "80-real"})
    monkeypatch.setattr(dispatch, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: None)
    chosen = [dispatch.select(op, cuda, torch.bfloat16) for op in ("consensus", "dual_attn", "embed")]
    dispatch._select.cache_clear()
    assert chosen == ["reference", "triton", "triton"]
    why = (
        "since the native module was built for 80-real, not for compute capability 10.0 "
        "(ORTHRUS_CUDA_ARCHS=100a-real builds for it)"
    )
    assert [r.getMessage().endswith(why) for r in caplog.records if r.levelname == "WARNING"] == [True, True]


@pytest.mark.parametrize(
    ("version", "why"),
    [("3.5.1", "triton must be 3.6 or later, got 3.5.1"), ("3.6.0", None), ("3.10.0+git", None)],
)
def test_a_triton_that_is_too_old_is_not_used(monkeypatch, version, why):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch.importlib.metadata, "version", lambda name: version)
    assert dispatch.why_no_triton.__wrapped__() == why


@pytest.mark.parametrize("found", (False, True))
def test_why_there_is_no_native_module(folder, monkeypatch, tmp_path, caplog, capsys, found):
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dispatch, "NATIVE", "broken" if found else "missing")
    caches = (dispatch.extension, dispatch.why_no_native, dispatch._select, dispatch._warn_once)
    for cache in caches:
        cache.cache_clear()
    try:
        assert dispatch.select("embed", torch.device("cpu"), torch.bfloat16) == "reference"
        assert main(["info", "--device", "cpu", "--model", folder]) == 0
    finally:
        for cache in caches:
            cache.cache_clear()
    source = Path(dispatch.__file__).parent
    why = f"the native module is not built in {source}, which orthrus_rt is imported from (pip install -e .)"
    if found:
        why = f"the native module cannot be loaded: {tmp_path}/broken.so: "
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith(f"ops on cpu run Triton or the reference: {why}")
    assert f"native    none, so ops run Triton or the reference: {why}" in capsys.readouterr().out


@pytest.mark.parametrize("isa", ("sm90a", "none"))
def test_a_driver_older_than_the_modules_cuda_is_told_at_once(monkeypatch, isa):
    built = {"cuda_archs": "90a-real", "cuda_version": "13.0"}
    module = SimpleNamespace(cuda=SimpleNamespace(isa=lambda: isa), build_info=lambda: built)
    monkeypatch.setattr(dispatch, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked, cuda = [], torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    why = dispatch.unavailable("cuda", "dual_attn", cuda, torch.bfloat16)
    want = "the native module, built with CUDA 13.0, cannot use the device: is its driver older?"
    assert why == (want if isa == "none" else None) and asked == [cuda]


def test_the_portable_attention_takes_bfloat16_alone():
    """In float32 it spills."""
    why = dispatch.unavailable("triton", "dual_attn", torch.device("cuda", 7), torch.float32)
    assert why == "the triton dual_attn takes bfloat16, not float32"


def test_float16_runs_the_reference():
    ops_of_elements = ("embed", "rms_norm", "row_linear", "qkv_commit", "dual_attn")
    assert {dispatch.select(op, torch.device("cpu"), torch.float16) for op in ops_of_elements} == {"reference"}
    why = dispatch.unavailable("cpu", "dual_attn", torch.device("cpu"), torch.float16)
    assert why == "the cpu dual_attn takes bfloat16 or float32, not float16"


@pytest.mark.native
@pytest.mark.parametrize("dtype", dispatch.ELEMENTS, ids=str)
def test_native_kernels_run_unless_told_otherwise(monkeypatch, dtype):
    cpu = torch.device("cpu")
    native = ("embed", "rms_norm", "row_linear", "qkv_commit", "dual_attn", "consensus")
    assert all(dispatch.select(op, cpu, dtype) == "cpu" for op in native)
    monkeypatch.setenv("ORTHRUS_BACKEND", "reference")
    assert all(dispatch.select(op, cpu, dtype) == "reference" for op in native)
    monkeypatch.setenv("ORTHRUS_BACKEND", "dual_attn=reference")
    assert dispatch.select("dual_attn", cpu, dtype) == "reference" and dispatch.select("embed", cpu, dtype) == "cpu"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("dual_attn=triton", RuntimeError, "dual_attn: the triton implementation was requested but is unavailable"),
        ("dual_attn=cuda", RuntimeError, "the cuda implementation needs cuda tensors, not cpu"),
        ("fast", ValueError, "ORTHRUS_BACKEND: cannot read 'fast'"),
        ("triton", ValueError, "ORTHRUS_BACKEND: triton does not implement all ops; name those that it is to run"),
        ("attention=cpu", ValueError, "ORTHRUS_BACKEND: cannot read 'attention=cpu'"),
    ],
)
def test_what_is_asked_for_and_missing_raises(monkeypatch, value, error, message):
    monkeypatch.setenv("ORTHRUS_BACKEND", value)
    with pytest.raises(error, match=message):
        dispatch.select("dual_attn", torch.device("cpu"), torch.bfloat16)
