"""Every CUDA source for every architecture: it compiles without a warning, nothing spills, shared memory fits."""

import re
import subprocess

import pytest

from tests import variants
from tests.compile import cubins

STATIC_SHARED_LIMIT = 48 << 10  # for any architecture; more has to be dynamic

pytestmark = pytest.mark.skipif(cubins.nvcc() is None, reason="nvcc is not installed: CUDA sources are not compiled")


@pytest.mark.parametrize("arch", cubins.ARCHS)
@pytest.mark.parametrize("source", variants.listed("CUDA_SOURCES"))
def test_compiles_without_warnings_or_spills(source, arch):
    report = cubins.reports()[source, arch].result()
    assert "warning" not in report, report
    for kernel in cubins.parse(report):
        assert kernel.spill_bytes == kernel.stack_bytes == 0, f"{source} {arch}: {kernel}"
        assert kernel.registers <= 255, f"{source} {arch}: {kernel}"
        assert kernel.static_shared_bytes <= STATIC_SHARED_LIMIT, f"{source} {arch}: {kernel}"


ADVICE = r".*(?:\(C\d+\)|warning|setmaxnreg).*"


@pytest.mark.parametrize("coded", [False, True])
def test_hopper_instructions_are_kept(coded):
    """ptxas repairs or gives up in silence, except for an advisory: a missing wgmma.fence, accumulators touched while a
    wgmma is in flight, registers that cannot be moved between warpgroups. All cost time, and the first hides a bug."""
    report = cubins.reports()[f"csrc/cuda/row_linear_sm90{'_coded' * coded}.cu", "sm_90a"].result()
    assert re.findall(ADVICE, report) == []
    # With many rows registers are moved: each of its 12 warps has to start with the same share of the register file.
    registers = {re.search(r"sm90I(Li\d+ELb[01])", k.name)[1]: k.registers for k in cubins.parse(report)}
    many_rows = (128,) if coded else (128, 192)
    assert all(registers[f"Li{rows}ELb1"] == 168 for rows in many_rows), registers
    # Two of these CTAs share an SM across kernel boundaries, with a norm's CTA in between: see test_triton.py.
    narrow, wide = ((16, 32, 64), (96, 112, 128, 160)) if coded else ((16, 32, 64, 96), (128, 160, 256))
    assert max(registers[f"Li{rows}ELb0"] for rows in narrow) <= 80, registers
    if not coded:  # two CTAs, of 288 threads each, without a norm's
        assert cubins.quarter_of_registers(2 * 9, registers["Li112ELb0"]) <= cubins.QUARTER, registers
    for rows in wide:
        assert cubins.quarter_of_registers(9, registers[f"Li{rows}ELb0"]) <= cubins.QUARTER, registers


def test_hopper_instructions_are_kept_in_attention():
    report = cubins.reports()["csrc/cuda/dual_attn_sm90.cu", "sm_90a"].result()
    assert re.findall(ADVICE, report) == []


@pytest.mark.parametrize("source", ["row_linear_sm90", "row_linear_sm90_coded", "dual_attn_sm90"])
def test_nothing_writes_what_wgmma_owns(source):
    """Between its fence and the end of its group; until the wait, ptxas would complain. PTX forbids it, whether or not
    ptxas moves such a write away.
    """
    report = cubins.reports()[f"csrc/cuda/{source}.cu", "sm_90a"].result()
    groups, spoilt = re.search(r"wgmma groups: (\d+), spoilt: (.*)", report).groups()
    assert int(groups) >= 7 and spoilt == "none"


def test_a_write_to_what_wgmma_owns_is_seen():
    group = """wgmma.fence.sync.aligned; {first}
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r5, %r6, %r7, %r8}, %rd1, 1, 1, 1;
        {last} wgmma.commit_group.sync.aligned; mov.f32 %f1, %f9;"""
    writes = {
        "mov.f32 %f9, %f1;": "none",
        "@%p1 mov.b32 %r7, %r9;": "%r7",
        "ld.shared.v2.f32 {%f3, %f9}, [%rd2];": "%f3",
    }
    for where in ("{first}", "{last}"):
        for write, spoilt in writes.items():
            assert cubins.wgmma_groups(group.replace(where, write)) == (1, spoilt)
    assert cubins.wgmma_groups("wgmma.fence; wgmma.commit_group;") == (1, "(a group without products)")


@pytest.mark.parametrize("coded", [False, True])
def test_copies_are_issued_once(coded):
    """Not in a loop over the lanes that may be active: the one thread that loads has some 200 clocks for a step."""
    if cubins.cuobjdump() is None:
        pytest.skip("no cuobjdump, which Triton has too")
    source = f"csrc/cuda/row_linear_sm90{'_coded' * coded}.cu"
    cubins.reports()[source, "sm_90a"].result()
    assert cubins.lane_loops(source) == 0


def test_a_row_linear_finds_room_beside_the_merge_of_attention():
    """With 32 rows of 32 heads an SM has at most 8 CTAs of the merge."""
    kernels = cubins.parse(cubins.reports()["csrc/cuda/dual_attn.cu", "sm_90a"].result())
    merges = [k.static_shared_bytes for k in kernels]
    assert len(merges) == 2 and 8 * (max(merges) + 1024) + cubins.ROW_LINEAR_SHARED <= cubins.SHARED, merges


@pytest.mark.parametrize("delay", [None, 0, 50_000])
def test_kernels_sleep_where_a_build_asks_for_it(tmp_path, delay):
    defined = [] if delay is None else [f"-DORTHRUS_PDL_DELAY_NS={delay}"]
    flags = ["-std=c++17", "-arch=sm_90a", f"-I{cubins.ROOT / 'csrc/include'}", *defined]
    source = cubins.ROOT / "csrc/cuda/row_linear_f32.cu"
    subprocess.run([cubins.nvcc(), "-ptx", *flags, str(source), "-o", tmp_path / "out.ptx"], check=True)
    found = re.findall(r"griddepcontrol\.wait|nanosleep|\b50000\b", (tmp_path / "out.ptx").read_text())
    assert found == ["griddepcontrol.wait", *(["50000", "nanosleep"] if delay else [])]


@pytest.mark.parametrize("arch", cubins.ARCHS)
def test_every_architecture_has_kernels(arch):
    """If a guard compiled everything away, the test above would still pass."""
    names = [k.name for s in variants.listed("CUDA_SOURCES") for k in cubins.parse(cubins.reports()[s, arch].result())]
    for op in ("row_linear", "qkv_commit", "dual_attn", "consensus"):
        assert any(op in name for name in names), f"{arch}: no kernel of {op} among {names}"
    for products in ("mma", *(["sm90"] if arch == "sm_90a" else [])):  # elsewhere the latter have no bodies
        attention = cubins.parse(cubins.reports()[f"csrc/cuda/dual_attn_{products}.cu", arch].result())
        assert len(attention) == {"mma": 10, "sm90": 9}[products], attention
        assert min(kernel.registers for kernel in attention) > 64, attention


def test_reads_a_report():
    text = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert cubins.parse(text) == [cubins.Kernel("_Z1fv", 255, 8, 16, 1024), cubins.Kernel("_Z1gv", 8, 0, 0, 0)]
