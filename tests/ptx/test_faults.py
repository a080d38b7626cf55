"""The emulator notices faults: kernels in which a wait, a barrier, a fence or a product is missing or wrong."""

import functools
import itertools
import re

import pytest
import torch

from tests.attention_pass import Heads, Pass
from tests.cpu import test_row_linear_on_host as rl
from tests.rows import ar, diff

pytestmark = pytest.mark.usefixtures("host")
MOST_INSTRUCTIONS = 8_000_000  # warp instructions in a launch: many times what any kernel takes
SEEDS = (1, 2)


def row_linear(host):
    outs = []
    for k, n, sms in ((512, 192, 4), (1024, 128, 5)):
        weight, x, residual = rl.tensor(n, k, seed=1), rl.tensor(9, k, seed=2), rl.tensor(9, n, seed=3)
        how = dict(sms=sms, descending=host.descending)
        outs += [rl.run(x, weight, **how), *rl.run(x, weight, "argmax", **how)]
        outs.append(rl.run(x, weight, "residual", residual=residual, diff=weight, num_rows_ar=4, **how))
    return outs


def dual_attn(host):
    # With 13 SMs the work is split too, and CTAs take several items.
    long = [ar(s, 1900, 1) for s in range(3, 6)]
    groups = [ar(0, 130, 6, invalid=2), ar(1, 300, 1), *long, diff(0, 135, 8), diff(2, 0, 70)]
    case, outs = Pass(Heads(3, 1, 64), groups, "cpu"), []
    for host.num_sms in (20, 13):
        outs.append(case.run(split=True).clone())
    return outs


def folded(host):
    host.num_sms = 1000
    return [Pass(Heads(2, 1, 128), [ar(0, 400, 70), diff(0, 470, 40)], "cpu").run(split=False)]


def prefill(host):
    weight, x = rl.tensor(320, 512, seed=1), rl.tensor(193, 512, seed=2)
    return [rl.run(x, weight, sms=4, descending=host.descending)]


def coded(host):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORTHRUS_CUDA_CODED", "1")
        return row_linear(host)


KERNELS = {  # name: part of the mangled name, and the function that calls it
    "sm80-row_linear": ("row_linear_mmaILi16ELb0ELi1ELb0E", row_linear),
    "sm90-row_linear": ("row_linear_sm90ILi16ELb0ELb0E", row_linear),
    "sm90-prefill": ("row_linear_sm90ILi128ELb1ELb0E", prefill),
    "sm90-coded": ("row_linear_sm90ILi16ELb0ELb1E", coded),
    "sm80-dual_attn": ("dual_attn_split_kernelINS0_7VariantILb0ELi64ELi4ELi2ELb0ELi1E", dual_attn),
    "sm90-folded": ("dual_attn_fold_kernelINS0_7VariantILb1ELi128ELi8ELi1ELb1E", folded),
    "sm90-dual_attn": ("dual_attn_split_kernelINS0_7VariantILb1ELi64ELi4ELi2ELb0ELi1E", dual_attn),
}
GONE, SWAPPED = "", r"\1{\3, \2,"  # the first two registers of an operand
MMA = r"(mma\.sync\S+\s+\{[^}]*\},\s*)\{(%\w+),\s*(%\w+),"
LAST_WAIT = r"mbarrier\.try_wait[^;]*;(?!([\s\S]*mbarrier\.try_wait){2})"  # it looks twice
FAULTS = {  # kernel, fault: a pattern for the lines, and their replacement
    ("sm80-row_linear", "no wait for copies"): (r"cp\.async\.wait_group[^;]*;", GONE),
    ("sm80-row_linear", "a wait for fewer copies"): (r"(cp\.async\.wait_group\s+)(\d)", r"\g<1>1\2"),
    ("sm80-row_linear", "no barriers"): (r"bar\.sync\s[^;]*;", GONE),
    ("sm80-row_linear", "a swapped operand"): (MMA, SWAPPED),
    ("sm80-row_linear", "a transposed operand"): (r"(ldmatrix\S*x4)", r"\1.trans"),
    ("sm80-dual_attn", "no wait for copies"): (r"cp\.async\.wait_(group|all)[^;]*;", GONE),
    ("sm80-dual_attn", "no barriers"): (r"bar\.sync\s[^;]*;", GONE),
    ("sm80-dual_attn", "a swapped operand"): (MMA, SWAPPED),
    ("sm80-dual_attn", "no transposed operand"): (r"\.trans", GONE),
    ("sm90-folded", "a wait for fewer copies"): (r"(cp\.async\.wait_group\s+)1", r"\g<1>2"),
    ("sm90-folded", "no proxy fences"): (r"fence\.proxy\.async[^;]*;", GONE),
    ("sm90-folded", "no barriers"): (r"bar\.sync\s[^;]*;", GONE),
    ("sm90-folded", "no wait for products"): (r"wgmma\.wait_group[^;]*;", GONE),
    ("sm90-folded", "columns that lie elsewhere"): (r"\b4611686293338849280\b", "4611686293322072064"),
    ("sm90-dual_attn", "no wait for copies"): (r"cp\.async\.wait_(group|all)[^;]*;", GONE),
    ("sm90-dual_attn", "no proxy fences"): (r"fence\.proxy\.async[^;]*;", GONE),
    ("sm90-dual_attn", "no barriers"): (r"bar\.sync\s[^;]*;", GONE),
    ("sm90-dual_attn", "no wait for products"): (r"wgmma\.wait_group[^;]*;", GONE),
    ("sm90-dual_attn", "a wait for fewer scores"): (r"(wgmma\.wait_group\S*\s+)1", r"\g<1>2"),
    ("sm90-dual_attn", "a wait for fewer sums"): (r"(wgmma\.wait_group\S*\s+)0", r"\g<1>1"),
    ("sm90-dual_attn", "no fence of products"): (r"wgmma\.fence[^;]*;", GONE),
    ("sm90-dual_attn", "swapped registers"): (r"(wgmma\.mma_async[^}]*\},\s*)\{(%r\d+), (%r\d+)", r"\1{\3, \2"),
    ("sm90-dual_attn", "swapped operands"): (r"(wgmma\.mma_async[^}]*\},\s*)(%rd\d+), (%rd\d+)", r"\1\3, \2"),
    ("sm90-dual_attn", "no transposed operand"): (r"(wgmma\.mma_async[^;]*\}, %rd\d+, p, 1, 1), 1;", r"\1, 0;"),
    ("sm90-row_linear", "no wait for copies"): (r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 done, 0, 0;"),
    ("sm90-row_linear", "no wait for products"): (r"wgmma\.wait_group[^;]*;", GONE),
    ("sm90-row_linear", "a wait for fewer products"): (r"(wgmma\.wait_group\S*\s+)(\d)", r"\g<1>1\2"),
    ("sm90-row_linear", "no fence of products"): (r"wgmma\.fence[^;]*;", GONE),
    ("sm90-row_linear", "no proxy fences"): (r"fence\.(proxy\.async|mbarrier_init)[^;]*;", GONE),
    ("sm90-row_linear", "no wait for the grid before"): (r"griddepcontrol\.wait;", GONE),
    ("sm90-row_linear", "no arrivals"): (r"mbarrier\.arrive\.shared[^;]*;", GONE),
    ("sm90-row_linear", "no barriers"): (r"bar\.sync\s[^;]*;", GONE),
    ("sm80-row_linear", "no order among CTAs"): (r"(atom\S*)\.acq_rel", r"\1.relaxed"),
    ("sm90-row_linear", "an order within a CTA alone"): (r"(atom\S*\.acq_rel)\.gpu", r"\1.cta"),
    ("sm90-coded", "no wait for copies"): (r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 done, 0, 0;"),
    ("sm90-coded", "no wait for products"): (r"wgmma\.wait_group[^;]*;", GONE),
    ("sm90-coded", "no fence of products"): (r"wgmma\.fence[^;]*;", GONE),
    ("sm90-coded", "swapped registers"): (r"(wgmma\.mma_async[^}]*\},\s*)\{(%r\d+), (%r\d+)", r"\1{\3, \2"),
    ("sm90-coded", "another order of bytes"): (r"\b20800\b", "20816"),
    ("sm90-coded", "a wait for fewer products"): (r"(wgmma\.wait_group\S*\s+)(\d)", r"\g<1>1\2"),
    ("sm90-coded", "a release of what is not fenced"): (r"(wait_group[^;]*;[^;]*)fence\.proxy\.async[^;]*;", r"\1"),
    ("sm90-prefill", "more registers than there are"): (r"(setmaxnreg\.inc\S*\s+)232", r"\g<1>240"),
    ("sm90-prefill", "registers that nobody gives"): (r"setmaxnreg\.dec[^;]*;", GONE),
    ("sm90-prefill", "no wait for products"): (r"wgmma\.wait_group[^;]*;", GONE),
    ("sm90-prefill", "no barrier of the cluster"): (r"barrier\.cluster\.[^;]*;", GONE),
    ("sm90-prefill", "no wait for the cluster"): (r"barrier\.cluster\.wait[^;]*;", GONE),
    ("sm90-prefill", "no fence ahead of the cluster's barrier"): (r"fence\.mbarrier_init[^;]*;", GONE),
    ("sm90-prefill", "copies to one CTA alone"): (r"\.multicast::cluster([^;]*), %rs\d+;", r"\1;"),
    ("sm90-prefill", "releases to one CTA alone"): (r"mapa\S* there, (%r\d+), %r\d+;", r"mov.b32 there, \1;"),
    ("sm90-prefill", "an end before the last releases"): (LAST_WAIT, "setp.eq.u32 done, 0, 0;"),
    ("sm90-row_linear", "swapped operands"): (r"(wgmma\.mma_async[^}]*\},\s*)(%rd\d+), (%rd\d+)", r"\1\3, \2"),
}


@pytest.fixture
def library(host):
    from tests.ptx.plugin import AT_ONCE, LIBRARY

    def outcome(call, path=None):
        """The results in several orders; None if the emulator has found something wrong."""
        outs = []
        try:
            assert LIBRARY.ptx_override(None if path is None else str(path).encode()) == 0, "it does not parse"
            for host.descending, seed in ((False, None), (True, None), *((False, seed) for seed in SEEDS)):
                LIBRARY.ptx_random(0 if seed is None else AT_ONCE, seed or 0)
                try:
                    outs += call(host)
                except AssertionError:
                    return None
        finally:
            LIBRARY.ptx_random(0, 0)
            LIBRARY.ptx_override(None)
        return outs

    LIBRARY.outcome = outcome
    LIBRARY.ptx_limit(MOST_INSTRUCTIONS)
    yield LIBRARY
    LIBRARY.ptx_limit(1 << 40)


@functools.cache
def kernel_text(part):
    """A module with only the kernel whose name contains ``part``."""
    from tests.ptx.plugin import FOLDER

    for path in FOLDER.glob("*.ptx"):
        text = path.read_text()
        starts = [m.start() for m in re.finditer(r"^(\.visible )?\.entry ", text, re.M)]
        for start, end in itertools.pairwise([*starts, len(text)]):
            if part in text[start:end].split("(")[0]:
                return text[: starts[0]] + text[start:end]
    raise LookupError(part)


@pytest.fixture
def isa(request, monkeypatch):
    monkeypatch.setenv("ORTHRUS_CUDA_ISA", request.getfixturevalue("kernel")[:4])


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


WANT = {}


def want(kernel, library):
    if kernel not in WANT:
        WANT[kernel] = library.outcome(KERNELS[kernel][1])
    return WANT[kernel]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_fault(kernel, library, tmp_path):
    part, call = KERNELS[kernel]
    (tmp_path / "kernel.ptx").write_text(kernel_text(part))
    assert same(library.outcome(call, tmp_path / "kernel.ptx"), want(kernel, library))
    assert part in library.ptx_launched().decode()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("kernel", "fault"), FAULTS)
def test_a_fault_is_seen(kernel, fault, library, tmp_path):
    part, call = KERNELS[kernel]
    text, count = re.subn(*FAULTS[kernel, fault], kernel_text(part))
    assert count
    (tmp_path / "kernel.ptx").write_text(text)
    got = library.outcome(call, tmp_path / "kernel.ptx")
    assert got is None or not same(got, want(kernel, library))
