"""Lossless to the bit on the embedded model, in bfloat16 and float32, and not slow: tokens, the logits behind each and
the cache are those of AR decoding alone, in every mode, batch and order. The small grid always runs (without AVX-512 a
smaller one, in bfloat16), the whole grid in ``make test-full``.
"""

import pytest
import torch

from orthrus_rt import prompts
from orthrus_rt.engine import Engine
from orthrus_rt.sampling import SamplingParams
from tests import lossless
from tests.pins import SLOW, UNLESS_SLOW, of_this_isa
from tests.traces import assert_same, decode

pytestmark = pytest.mark.native

# Tokens per two-pass cycle, greedy, bf16, K = 16, at most 128 tokens per prompt, token-weighted over all prompts of the
# kind, for each CPU variant. Variants round differently, so where two logits nearly tie, the text differs, and with it
# the rate. A broken drafter gives about 1.
PINNED = {
    "avx512_bf16": {"code": 3.555, "chat": 3.176, "long": 4.932},
    "amx_bf16": {"code": 3.609, "chat": 3.552, "long": 5.347},
    "neon": {"code": 3.481, "chat": 3.352, "long": 4.704},
    "avx512": {"code": 3.548, "chat": 3.296, "long": 4.417},
}
TIGHT, LOOSE = 0.05, 0.4
# The small grid: one prompt per kind, and how many tokens each gets. Passes in float32 take four times as long, so it
# has two prompts there, and one draft_len.
SMALL = [prompts.load(kind)[0] for kind in (("code", "chat", "long") if SLOW else prompts.KINDS)]
LENGTHS = {
    "greedy": {torch.bfloat16: 24 if SLOW else 48, torch.float32: 24},
    "sampled": {torch.bfloat16: 16, torch.float32: 16},
}
# Tokens per cycle over the small grid, by draft_len.
PINNED_SMALL = {
    "avx512_bf16": {
        torch.bfloat16: {
            "two_pass": {"greedy": {5: 2.907, 15: 2.792}, "sampled": {5: 2.143}},
            "one_pass": {"greedy": {5: 1.88}, "sampled": {5: 1.579}},
        },
        torch.float32: {
            "two_pass": {"greedy": {5: 2.3}, "sampled": {5: 2.143}},
            "one_pass": {"greedy": {5: 1.704}, "sampled": {5: 1.364}},
        },
    },
}
PINNED_SMALL["amx_bf16"] = PINNED_SMALL["avx512_bf16"] | {
    torch.bfloat16: {
        "two_pass": {"greedy": {5: 2.82, 15: 2.968}, "sampled": {5: 2.143}},
        "one_pass": {"greedy": {5: 1.918}, "sampled": {5: 1.5}},
    },
}
PINNED_SMALL["avx512"] = PINNED_SMALL["avx512_bf16"] | {
    torch.bfloat16: {
        "two_pass": {"greedy": {5: 2.792, 15: 2.765}, "sampled": {5: 2.093}},
        "one_pass": {"greedy": {5: 1.855}, "sampled": {5: 1.579}},
    },
}

PINNED_SLOW = {
    "neon": {
        torch.bfloat16: {
            "two_pass": {"greedy": {5: 2.875, 15: 2.875}, "sampled": {5: 2.143}},
            "one_pass": {"greedy": {5: 1.725}, "sampled": {5: 1.5}},
        },
        torch.float32: {
            "two_pass": {"greedy": {5: 2.3}, "sampled": {5: 2.5}},
            "one_pass": {"greedy": {5: 1.704}, "sampled": {5: 1.667}},
        },
    },
}
PINNED_SLOW["avx512"] = PINNED_SLOW["neon"] | {
    torch.bfloat16: {
        "two_pass": {"greedy": {5: 2.464, 15: 2.556}, "sampled": {5: 2.0}},
        "one_pass": {"greedy": {5: 1.725}, "sampled": {5: 1.429}},
    },
}
PINNED_SLOW["avx512_bf16"] = PINNED_SLOW["neon"]  # near enough for the portable set


@pytest.fixture(scope="module", params=("bfloat16", pytest.param("float32", marks=UNLESS_SLOW)))
def engine(request):
    return Engine.from_pretrained(
        "smollm2-135m",
        device="cpu",
        mode="two_pass",
        draft_len=15,
        dtype=request.param,
        max_seq_len=2048,
        num_pages=64,
        prefix_caching=False,
    )


@pytest.fixture(scope="module", params=("greedy", "sampled"))
def jobs(request, engine):
    """The small grid: ``(prompts, params, AR alone)``, in float32 of two prompts. Where passes are slow, the long
    prompt, most of whose time is its prefill, is decoded only greedily.
    """
    few = engine.model.dtype is torch.float32 or (SLOW and request.param == "sampled")
    ids = [p.encode(engine.tokenizer) for p in (SMALL[:2] if few else SMALL)]
    most = LENGTHS[request.param][engine.model.dtype]
    params = getattr(lossless, request.param)(len(ids), max_new_tokens=most)
    return ids, params, decode(engine, ids, params, mode="ar")


@pytest.mark.parametrize("mode", lossless.MODES)
def test_small_grid_alone(engine, jobs, mode):
    pinned, tolerance = of_this_isa(PINNED_SLOW if SLOW else PINNED_SMALL, TIGHT, LOOSE)
    pinned = pinned[engine.model.dtype][mode]["greedy" if jobs[1][0].greedy else "sampled"]
    got = [lossless.check_alone(engine, *jobs, way) for way in lossless.ways(pinned, [mode])]
    assert got == pytest.approx(list(pinned.values()), abs=tolerance)


@pytest.mark.parametrize("engine", ("bfloat16", pytest.param("float32", marks=pytest.mark.full)), indirect=True)
def test_small_grid_together(engine, jobs):
    """Greedy requests run in one mode and sampled ones in the other: test_lossless_tiny.py runs both in both modes, and
    the same Python in float32.
    """
    way = lossless.ways([5])[not jobs[1][0].greedy]
    lossless.check_together(engine, *jobs, way)


@pytest.mark.parametrize("engine", (pytest.param("bfloat16", marks=UNLESS_SLOW),), indirect=True)
@pytest.mark.parametrize("jobs", ("greedy",), indirect=True)  # sampled ones are too short to run out of pages
def test_small_grid_preempted(engine, jobs):
    """In one mode; test_lossless_tiny.py has both, and the whole grid the other."""
    way = lossless.ways([5], ["one_pass"])[0]
    lossless.check_preempted(engine, *jobs, way, num_pages=9 if SLOW else 12)


@pytest.mark.full  # test_lossless_tiny.py always does the same
@pytest.mark.parametrize("engine", ("bfloat16",), indirect=True)
@pytest.mark.parametrize("jobs", ("greedy",), indirect=True)
def test_small_grid_eager_and_replayed(engine, jobs):
    for way in lossless.ways([7]):
        lossless.check_eager(engine, *(column[:2] for column in jobs), way)


# The draft lengths of the whole grid. Greedy two_pass runs with all of them, alone in bfloat16 and in batches in
# float32; test_lossless_tiny.py runs sampled requests with all of them.
SOME, EVERY = (3, 7, 15), range(1, 16)
WHOLE = {
    (torch.bfloat16, "alone"): {"two_pass": EVERY, "one_pass": SOME},
    (torch.bfloat16, "together"): {"two_pass": SOME, "one_pass": SOME},
    (torch.float32, "alone"): {"two_pass": (7,), "one_pass": (7,)},
    (torch.float32, "together"): {"two_pass": EVERY, "one_pass": (1, 7)},
}


def whole_ways(engine, company, greedy=True):
    draft_lens = WHOLE[engine.model.dtype, company]
    if not greedy:
        draft_lens = draft_lens | {"two_pass": SOME}
    return [way for mode in draft_lens for way in lossless.ways(draft_lens[mode], [mode])]


@pytest.mark.full
@pytest.mark.parametrize("prompt", prompts.load(), ids=lambda p: p.name)
def test_whole_grid_alone(engine, prompt):
    """128 tokens of each prompt."""
    ids, params = [prompt.encode(engine.tokenizer)], lossless.greedy(1, max_new_tokens=128)
    want = decode(engine, ids, params, mode="ar")
    for way in whole_ways(engine, "alone"):
        assert lossless.check_alone(engine, ids, params, want, way) > 1.1


@pytest.mark.full
@pytest.mark.parametrize("kind", prompts.KINDS)
@pytest.mark.parametrize("params", (lossless.greedy, lossless.sampled), ids=("greedy", "sampled"))
def test_whole_grid_together(engine, params, kind):
    """128 tokens of all prompts of a kind, batched with random others, and on few pages."""
    ids = [p.encode(engine.tokenizer) for p in prompts.load(kind)]
    each = params(len(ids), max_new_tokens=128)
    want = decode(engine, ids, each, mode="ar")
    for seed, way in enumerate([dict(mode="ar"), *whole_ways(engine, "together", each[0].greedy)]):
        lossless.check_together(engine, ids, each, want, way, seed)
    lossless.check_preempted(engine, ids, each, want, lossless.ways((7,))[0], num_pages=16)


def tokens_per_cycle(engine, chosen, most=128) -> float:
    tokens = cycles = 0
    for prompt in chosen:
        stats = engine.generate(prompt.encode(engine.tokenizer), SamplingParams(max_new_tokens=most)).stats
        tokens, cycles = tokens + stats.tokens - 1, cycles + stats.cycles
    return tokens / cycles


# The small grid pins a prompt of each kind too.
@pytest.mark.parametrize("engine", (pytest.param("bfloat16", marks=UNLESS_SLOW),), indirect=True)
@pytest.mark.parametrize("kind", (*(pytest.param(kind, marks=pytest.mark.full) for kind in ("code", "chat")), "long"))
def test_tokens_per_cycle_is_pinned(engine, kind):
    pinned, tolerance = of_this_isa(PINNED, TIGHT, LOOSE)
    assert tokens_per_cycle(engine, prompts.load(kind)) == pytest.approx(pinned[kind], abs=tolerance)


@pytest.mark.skipif(not SLOW, reason="test_tokens_per_cycle_is_pinned has all prompts")
@pytest.mark.parametrize("engine", ("bfloat16",), indirect=True)
def test_tokens_per_cycle_of_two_prompts(engine):
    pinned, tolerance = of_this_isa({"neon": 3.229, "avx512": 3.424, "avx512_bf16": 3.229}, TIGHT, LOOSE)
    assert tokens_per_cycle(engine, prompts.load("code")[:2], 64) == pytest.approx(pinned, abs=tolerance)


@pytest.mark.parametrize("engine", ("bfloat16",), indirect=True)
def test_prefill_of_a_long_prompt(engine, monkeypatch):
    """In chunks, the last of which is not full. Neither their size nor the mode changes a bit of what follows."""
    text = " ".join(p.text for p in prompts.load("long")) + " "
    count = 560 if SLOW else 1100
    ids = engine.tokenizer(text * 2).input_ids[:count]
    assert len(ids) == count
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    want = decode(engine, [ids], params)
    assert len(want[0].tokens) == 24 and want[0].tokens_per_cycle > 1.5
    monkeypatch.setattr("orthrus_rt.runner.PREFILL_CHUNK", 300)
    assert_same(decode(engine, [ids], params, mode="ar"), want)
