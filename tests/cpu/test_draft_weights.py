"""Which weights a pass multiplies by, and which passes and weights may do without bits: those that nothing but drafts
depends on.
"""

import itertools

import pytest

from orthrus_rt import dispatch, model, ops, weights
from orthrus_rt.prefill import prefill_rows
from orthrus_rt.sampling import SamplingParams
from tests import engines
from tests.native_cpu import randn

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def passes(monkeypatch):
    """Of every pass: its AR rows, its diffusion rows, and what its calls of row_linear say of ``exact``."""
    seen, forward, row_linear = [], model.forward, ops.row_linear

    def noting_forward(weights, kv, rows, *args, **kwargs):
        seen.append((rows.num_rows_ar, rows.num_rows_diff, []))
        return forward(weights, kv, rows, *args, **kwargs)

    def noting_linear(*args, exact, **kwargs):
        seen[-1][2].append(exact)
        return row_linear(*args, exact=exact, **kwargs)

    monkeypatch.setattr(ops, "row_linear", noting_linear)
    for module in ("cycle", "prefill", "runner"):
        monkeypatch.setattr(f"orthrus_rt.{module}.forward", noting_forward)
    return seen


@pytest.mark.parametrize(
    ("mode", "sampled"),
    [
        *((mode, {}) for mode in ("ar", "two_pass", "one_pass")),
        *(("two_pass", {"temperature": 0.8, "acceptance": how}) for how in ("coupled", "rejection")),
    ],
)
def test_a_pass_with_ar_rows_is_exact(folder, passes, mode, sampled):
    engine = engines.make(folder, mode=mode, max_seq_len=64)
    engine.generate(PROMPT, SamplingParams(max_new_tokens=6, seed=3, **sampled))
    assert any(calls for _, _, calls in passes)
    for rows_ar, _, calls in passes:
        assert len(calls) in (8, 9) and set(calls) == {rows_ar > 0}  # two layers of four, and the head
    assert ((0, 8) in {p[:2] for p in passes}) == (mode == "two_pass")


def test_a_pass_with_ar_rows_cannot_be_inexact(folder):
    engine = engines.make(folder, max_seq_len=64)
    runner = engine.runner
    rows = prefill_rows([(PROMPT, 0, 0)], "cpu")
    rest = dict(logit_rows=None, epilogue="argmax", out=None)
    with pytest.raises(AssertionError):
        model.forward(engine.model, engine.kv, rows, runner.activations, runner.workspace, exact=False, **rest)


@pytest.mark.parametrize("mode", ("ar", "two_pass", "one_pass"))
def test_each_product_names_the_weight_of_the_next(folder, monkeypatch, mode):
    """For its prefetch: the AR view's if the pass has AR rows. The last one before the head or of a pass names none."""
    calls, row_linear = [], ops.row_linear

    def noting(x, weight, out, **how):
        calls.append((weight if how.get("num_rows_ar", 1) else how["weight_diff"], how.get("next_weight")))
        row_linear(x, weight, out, **how)

    monkeypatch.setattr(ops, "row_linear", noting)
    engine = engines.make(folder, mode=mode, max_seq_len=64)
    engine.generate(PROMPT, SamplingParams(max_new_tokens=6, ignore_eos=True))
    first, head = engine.model.layers[0], engine.model.lm_head
    unnamed = [id(weight) for weight in (head, first.qkv, first.qkv_diff)]
    for (_, named), (weight, _) in itertools.pairwise(calls):
        assert named is (None if id(weight) in unnamed else weight)
    assert calls[-1] == (head, None)


@pytest.mark.native
@pytest.mark.parametrize("takes", (True, False), ids=("coded", "plain"))
def test_only_the_diffusion_views_own_weights_are_short(folder, monkeypatch, takes):
    monkeypatch.setattr(dispatch.extension().cpu, "takes_coded_weights", lambda: takes)
    network = engines.make(folder, max_seq_len=64).model
    every = [network.lm_head, *(w for layer in network.layers for w in vars(layer).values())]
    short = [w for layer in network.layers for w in (layer.qkv_diff, layer.o_diff)]
    for weight in every:
        if isinstance(weight, weights.PackedWeight):
            assert weight.bits == ((8 if any(weight is w for w in short) else 12) if takes else 16)


@pytest.mark.native
@pytest.mark.parametrize("takes", (True, False), ids=("coded", "plain"))
def test_bytes_that_are_read(monkeypatch, takes):
    """Of coded weights 8 bits per element, and each strip's head and exceptions."""
    monkeypatch.setattr(dispatch.extension().cpu, "takes_coded_weights", lambda: takes)
    weight, short = (weights.pack(randn(200, 576, seed=1), impl="cpu", bits=bits) for bits in (12, 8))
    assert weight.coded == takes and weight.read_bytes() == weight.nbytes
    padded = 224 * 576
    assert weight.nbytes - weight.read_bytes(exact=False) == (padded // 2 if takes else 0)
    assert short.nbytes == short.read_bytes() == short.read_bytes(exact=False) == weight.read_bytes(exact=False)
    if takes:
        assert 0 <= short.nbytes - padded < 0.02 * padded
