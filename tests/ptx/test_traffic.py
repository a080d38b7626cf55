"""The emulator's counters, on kernels of a few lines with a known number of sectors and wavefronts."""

import pytest
import torch

KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry counted(
.param .u64 counted_0
)
.maxntid 32
{{
.reg .pred %p<4>;
.reg .b32 %r<32>;
.reg .b64 %rd<8>;
.shared .align 128 .b8 space[16384];
ld.param.u64 %rd1, [counted_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, space;
{fill}
{body}
ret;
}}
"""
FILL = "shl.b32 %r3, %r1, 4;\nadd.s32 %r3, %r3, %r2;\n" + "\n".join(
    f"st.shared.v4.b32 [%r3+{at}], {{%r1, %r1, %r1, %r1}};" for at in range(0, 16384, 512)
)
# The address of lane l in global or shared memory: base + l * the given number of bytes.
GLOBAL = "mul.wide.u32 %rd2, %r1, {};\nadd.s64 %rd2, %rd2, %rd1;\n"
SHARED = "mul.lo.s32 %r4, %r1, {};\nadd.s32 %r4, %r4, %r2;\n"
V4 = "{%r5, %r6, %r7, %r8}"


@pytest.fixture
def counted(tmp_path):
    """Counts of a kernel's body, run by one warp. All shared memory has been written, and global memory is one tensor
    that begins at a line.
    """
    from tests.ptx.plugin import LIBRARY

    def run(body, fill=FILL):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ptx"  # each file is read once
        path.write_text(KERNEL.format(fill=fill, body=body))
        memory = torch.zeros(8192, dtype=torch.int32)
        memory = memory[-memory.data_ptr() // 4 % 32 :]
        LIBRARY.ptx_traffic(1)
        LIBRARY.launch(path, "counted", (1,), 32, 0, [memory])
        return LIBRARY.traffic()["counted"]

    yield run
    LIBRARY.ptx_traffic(0)


@pytest.mark.parametrize(
    ("body", "sectors", "least", "lines"),
    [
        (GLOBAL.format(4) + "ld.global.b32 %r5, [%rd2];", 4, 4, 1),
        (GLOBAL.format(4) + "ld.global.b32 %r5, [%rd2+4];", 5, 4, 2),  # across a line
        (GLOBAL.format(8) + "ld.global.b32 %r5, [%rd2];", 8, 4, 2),
        (GLOBAL.format(32) + "ld.global.b32 %r5, [%rd2];", 32, 4, 8),  # eight floats apart
        (GLOBAL.format(0) + "ld.global.b32 %r5, [%rd2];", 1, 1, 1),
        (GLOBAL.format(2) + "ld.global.b16 %r5, [%rd2];", 2, 2, 1),
        (GLOBAL.format(16) + f"ld.global.v4.b32 {V4}, [%rd2];", 16, 16, 4),
        (GLOBAL.format(4) + "setp.lt.u32 %p1, %r1, 8;\n@%p1 ld.global.b32 %r5, [%rd2];", 1, 1, 1),
    ],
)
def test_loads(counted, body, sectors, least, lines):
    got = counted(body)
    assert got["loads"] | {"bytes": 0} == dict(requests=1, bytes=0, sectors=sectors, least=least, lines=lines)
    assert got["distinct_read"] == sectors and not got["distinct_written"]


def test_stores_atomics_and_what_is_read_again(counted):
    stores = GLOBAL.format(16) + "st.global.b32 [%rd2], %r1;\n"
    atomic = "atom.global.add.u32 %r5, [%rd1], %r1;\n"
    loads = "ld.global.b32 %r5, [%rd2];\n" * 3
    got = counted(stores + atomic + loads)
    assert got["stores"] == dict(requests=2, bytes=256, sectors=17, least=5, lines=5)
    assert got["loads"] == dict(requests=3, bytes=3 * 128, sectors=3 * 16, least=3 * 4, lines=3 * 4)
    assert (got["distinct_read"], got["distinct_written"]) == (16, 16)
    assert (got["global_load"], got["global_store"]) == (3, 2)


@pytest.mark.parametrize(
    ("bytes_apart", "what", "wavefronts", "least"),
    [
        (4, "b32 %r5", 1, 1),
        (8, "b32 %r5", 2, 1),
        (132, "b32 %r5", 1, 1),  # padded rows
        (128, "b32 %r5", 32, 1),
        (0, "b32 %r5", 1, 1),  # one word for all
        (1, "b8 %r5", 1, 1),
        (8, "v2.b32 {%r5, %r6}", 2, 2),
        (16, "v2.b32 {%r5, %r6}", 4, 2),
        (16, f"v4.b32 {V4}", 4, 4),
        (32, f"v4.b32 {V4}", 8, 4),
        (144, f"v4.b32 {V4}", 4, 4),
        (128, f"v4.b32 {V4}", 32, 4),
    ],
)
def test_shared_memory(counted, bytes_apart, what, wavefronts, least):
    want = dict(requests=1, wavefronts=wavefronts, least=least)
    assert counted(SHARED.format(bytes_apart) + f"ld.shared.{what}, [%r4];")["shared_loads"] == want
    kind, register = what.split(" ", 1)
    assert counted(SHARED.format(bytes_apart) + f"st.shared.{kind} [%r4], {register};", "")["shared_stores"] == want


SWIZZLED = """
and.b32 %r9, %r1, 7;
shl.b32 %r9, %r9, 4;
shl.b32 %r4, %r1, 7;
xor.b32 %r4, %r4, %r9;
add.s32 %r4, %r4, %r2;
"""


@pytest.mark.parametrize(
    ("address", "wavefronts"),
    [(SHARED.format(16), 4), (SHARED.format(144), 4), (SWIZZLED, 4), (SHARED.format(128), 32)],
)
def test_matrices(counted, address, wavefronts):
    got = counted(address + f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {V4}, [%r4];")
    assert got["matrices"] == dict(requests=1, wavefronts=wavefronts, least=4)
    got = counted(address + "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r4];")
    assert got["matrices"] == dict(requests=1, wavefronts=wavefronts // 2, least=2)


@pytest.mark.parametrize(("address", "wavefronts"), [(SHARED.format(16), 4), (SHARED.format(128), 32), (SWIZZLED, 4)])
def test_copies(counted, address, wavefronts):
    copy = "cp.async.cg.shared.global [%r4], [%rd2], 16;\n"
    got = counted(address + GLOBAL.format(16) + copy, "")
    assert got["copies"] == dict(requests=1, bytes=512, sectors=16, least=16, lines=4)
    assert got["shared_copies"] == dict(requests=1, wavefronts=wavefronts, least=4)
    size = "setp.lt.u32 %p1, %r1, 8;\nselp.b32 %r5, 16, 0, %p1;\n"
    got = counted(address + GLOBAL.format(16) + size + copy.replace("16;", "16, %r5;"), "")
    assert got["copies"] == dict(requests=1, bytes=128, sectors=4, least=4, lines=1)  # zeros need no source


BULK = """
setp.ne.u32 %p1, %r1, 0;
@%p1 bra done;
mbarrier.init.shared.b64 [%r2], 1;
fence.mbarrier_init.release.cluster;
add.s32 %r4, %r2, 1024;
add.s64 %rd2, %rd1, 16;
add.s64 %rd3, %rd1, 512;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 64;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd2], 64, [%r2];
cp.async.bulk.prefetch.L2.global [%rd3], 1024;
mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;
done:
"""


def test_bulk_copies(counted):
    got = counted(BULK, "")
    assert got["bulk"] == dict(requests=1, bytes=64, sectors=3, least=2, lines=1)
    assert got["prefetches"] == dict(requests=1, bytes=1024, sectors=32, least=32, lines=8)
    assert got["distinct_read"] == 3 and got["copy"] == 2


def test_instructions(counted):
    body = """
    cvt.rn.f32.s32 %r5, %r1;
    add.f32 %r5, %r5, %r5;
    ex2.approx.ftz.f32 %r5, %r5;
    add.s32 %r6, %r1, 1;
    setp.lt.u32 %p1, %r1, 0;
    @%p1 add.s32 %r6, %r6, 1;
    bar.sync 0;
    shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
    """
    got = counted(body, "")
    want = dict(float=2, special=1, integer=3, barrier=1, shuffle=1, branch=1, move=3)
    assert {unit: got[unit] for unit in want} == want
    assert (got["launches"], got["ctas"], got["threads"]) == (1, 1, 32)


def test_the_table(counted):
    from tests.ptx import traffic

    got = counted(SHARED.format(8) + GLOBAL.format(8) + "ld.shared.b32 %r5, [%r4];\nst.global.b32 [%rd2], %r5;\n" * 2)
    figures = traffic.figures_of(got)
    assert figures["excess sectors %"] == 100.0 and figures["bank conflicts"] == "load +100%"
    assert (figures["KB read"], figures["KB written"]) == (0, 0.25)
    assert "load +100%" in traffic.table({"counted": got})
