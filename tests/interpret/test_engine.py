"""Whole generations with all kernels that a GPU runs: those in CUDA as host C++, those in Triton in its interpreter."""

import pytest

pytest.importorskip("triton")
from orthrus_rt import dispatch
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import lossless, traces
from tests.cpu import cuda_host
from tests.cpu.cuda_host import device

pytestmark = pytest.mark.skipif(
    dispatch.extension() is None or cuda_host.compiler() is None, reason="needs the native module and a C++ compiler"
)

KWARGS = dict(max_new_tokens=4, ignore_eos=True)
JOBS = (
    [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]],
    [
        SamplingParams(max_new_tokens=7, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, **KWARGS),
        SamplingParams(frequency_penalty=0.5, logit_bias={5: 1.0}, min_tokens=3, **KWARGS),
    ],
)


def test_every_mode_gives_the_ar_bits(folder, monkeypatch):
    """Alone and together with recorded cycles, and op by op. Logits equal the CPU's except for rounding."""
    how = dict(device="cpu", mode="two_pass", max_seq_len=128, max_batch_size=4, prefix_caching=False)
    want = Engine.from_pretrained(folder, **how).next_logits(JOBS[0][0])
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", "sm90")
    with device.installed(others="triton") as gpu:
        engine = Engine.from_pretrained(folder, **how)
        engine.runner.pads_prefill = True
        assert (engine.next_logits(JOBS[0][0]) - want).abs().max() < 2e-2 * want.abs().max()
        assert gpu.num_launches > 8
        ar, two_pass = traces.decode(engine, *JOBS, mode="ar"), dict(mode="two_pass", draft_len=2)
        assert lossless.check_alone(engine, *JOBS, ar, two_pass) > 1.2
        sampled = *(column[1:2] for column in JOBS), ar[1:2]
        lossless.check_alone(engine, *sampled, dict(mode="one_pass", draft_len=2, fan_out=2))
        got = traces.decode(engine, *JOBS, together=True, **two_pass)
        traces.assert_same(got, ar)
        lossless.check_pace(engine, *JOBS, two_pass, got, "together")
        with traces.eager_cycles(engine):
            traces.assert_same(traces.decode(engine, *(column[:2] for column in JOBS), mode="ar"), ar[:2])
