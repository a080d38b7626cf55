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


@pytest.mark.parametrize("coded", [False, True])
def test_hopper_instructions_are_kept(coded):
    """ptxas repairs or gives up in silence, except for an advisory: a missing wgmma.fence, accumulators touched while a
    wgmma is in flight, registers that cannot be moved between warpgroups. All cost time, and the first hides a bug."""
    report = cubins.reports()[f"csrc/cuda/row_linear_sm90{'_coded' * coded}.cu", "sm_90a"].result()
    assert re.findall(r".*(?:\(C\d+\)|warning|setmaxnreg).*", report) == []
    # With many rows registers are moved: each of its 12 warps has to start with the same share of the register file.
    registers = {re.search(r"sm90I(Li\d+ELb[01])", k.name)[1]: k.registers for k in cubins.parse(report)}
    many_rows = (128,) if coded else (128, 192)
    assert all(registers[f"Li{rows}ELb1"] == 168 for rows in many_rows), registers
    # Two of these CTAs share an SM across kernel boundaries, with a norm's CTA in between: see test_triton.py.
    narrow, wide = ((16, 32, 64), (96, 128, 160)) if coded else ((16, 32, 64, 96), (128, 160, 256))
    assert max(registers[f"Li{rows}ELb0"] for rows in narrow) <= 80, registers
    for rows in wide:
        assert cubins.quarter_of_registers(9, registers[f"Li{rows}ELb0"]) <= cubins.QUARTER, registers


@pytest.mark.parametrize("coded", [False, True])
def test_copies_are_issued_once(coded):
    """Not in a loop over the lanes that may be active: the one thread that loads has some 200 clocks for a step."""
    report = cubins.reports()[f"csrc/cuda/row_linear_sm90{'_coded' * coded}.cu", "sm_90a"].result()
    if cubins.cuobjdump() is None:
        pytest.skip("no cuobjdump, which Triton has too")
    assert re.search(r"lane loops: (\d+)", report)[1] == "0"


def test_a_row_linear_finds_room_beside_the_merge_of_attention():
    """With 32 rows of 32 heads an SM has at most 8 CTAs of the merge."""
    kernels = cubins.parse(cubins.reports()["csrc/cuda/dual_attn.cu", "sm_90a"].result())
    merges = [k.static_shared_bytes for k in kernels if "merge" in k.name]
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
