"""The plain torch oracle as a backend: the only one for float16, and ``ORTHRUS_BACKEND=reference`` in any dtype.

Its reductions depend on shapes, so no bits are promised: tokens are equal unless two logits nearly tie. Here none do.
"""

import pytest

from orthrus_rt import dispatch
from orthrus_rt.engine import Engine
from tests import checkpoints, engines, lossless

FULL = pytest.mark.full  # logits are processed in fp32, whatever the dtype


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float16", "greedy"), ("float32", "sampled"),
        pytest.param("float16", "sampled", marks=FULL), pytest.param("float32", "greedy", marks=FULL),
    ],
)  # fmt: skip
def test_every_mode_gives_the_ar_tokens(dtype, kind, tmp_path, monkeypatch):
    folder = str(checkpoints.make(tmp_path, "qwen3", diff_noise=0.05))
    prompts = lossless.random_prompts(96, 4, 80, seed=1)
    params = getattr(lossless, kind)(4, max_new_tokens=16, ignore_eos=True)
    native = Engine.from_pretrained(folder, device="cpu", dtype="float32", max_seq_len=128).next_logits(prompts[0])
    monkeypatch.setenv("ORTHRUS_BACKEND", "reference")
    engine = Engine.from_pretrained(folder, device="cpu", mode="two_pass", dtype=dtype, max_seq_len=128)
    assert {dispatch.select(op, engine.device, engine.model.dtype) for op in dispatch.OPS} == {"reference"}
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert (engine.next_logits(prompts[0]) - native).abs().max() <= tolerance * native.abs().max()
    want = [out.token_ids for out in engine.generate(prompts, params, mode="ar")]
    for way in lossless.ways((1, 3, 7)):
        outs = engine.generate(prompts, params, **way)
        assert [out.token_ids for out in outs] == want
        # Random weights: almost no draft after an unseen bonus token is accepted.
        rate = sum(o.stats.tokens - 1 for o in outs) / sum(o.stats.cycles for o in outs)
        assert rate > {"two_pass": 1.3, "one_pass": 1.0}[way["mode"]]


@pytest.mark.parametrize("op", ("process_logits", "count_tokens"))
def test_one_op_of_the_reference_among_native_ones(op, folder, monkeypatch):
    """No recording may contain what only Python runs: it would replay the first cycle's choices."""
    prompts = lossless.random_prompts(96, 3, 80, seed=2)
    edits = {} if op == "process_logits" else dict(frequency_penalty=0.3)
    params = lossless.sampled(3, max_new_tokens=16, ignore_eos=True, **edits)

    def run():
        engine = engines.make(folder, mode="two_pass", max_seq_len=128, max_batch_size=3)
        return [(o.token_ids, o.stats.accepted) for o in engine.generate(prompts, params)]

    want = run()
    monkeypatch.setenv("ORTHRUS_BACKEND", f"{op}=reference")
    assert run() == want
