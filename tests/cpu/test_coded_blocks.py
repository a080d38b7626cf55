"""bf16 weights in 12 bits for the CUDA kernels: the format and row_linear give every bit back, except to drafts, for
which there are also weights in 8 bits.
"""

import ctypes
import functools
import itertools

import numpy as np
import pytest
import torch

from orthrus_rt import coded_blocks, native, ops, room, weights
from orthrus_rt.checkpoint import load, load_config
from orthrus_rt.weights import cuda_blocks, pack, pack_views
from tests import checkpoints
from tests.cpu import test_row_linear_on_host as rl
from tests.cpu.test_coded_weight import with_exponents
from tests.cpu.test_cuda_on_host import INVALID

BYTES, LEADING, LISTED = 6208, 4160, 12  # of a block: bytes, those that drafts read, and room for exceptions
CPU = torch.device("cpu")


def spread(count, features=64, inputs=64):
    """A weight with ``count`` exceptions spread over it; by default it is a single block."""
    block = with_exponents((features, inputs), range(112, 128), seed=1)
    where = torch.randperm(features * inputs, generator=torch.Generator().manual_seed(2))[:count]
    block.view(-1)[where] = with_exponents((count,), range(40, 72, 2), seed=3)
    return block


WEIGHTS = {
    "random": lambda: rl.tensor(192, 256, seed=1),
    "one block": lambda: rl.tensor(64, 64, seed=1),
    "eight exponents": lambda: with_exponents((64, 128), [e for i in range(8) for e in (16 * i, 16 * i + 1)]),
    "one exception": lambda: spread(1),
    "as many as are listed": lambda: spread(LISTED),
    "one more": lambda: spread(LISTED + 1),
    "some in every block": lambda: torch.cat([torch.cat([spread(n), spread(60 - n)], 1) for n in (0, 1, 12, 31)]),
    "every exponent": lambda: with_exponents((128, 192), range(256)),
    "all zero": lambda: torch.zeros(64, 64, dtype=torch.bfloat16),
}
ROWS = 1, 24, 64, 90, 112, 128, 150
# Features, inputs, SMs: cut tiles of one block and of two, which CTAs share.
CUT = {"cut": (192, 1024, 5), "cut pairs": (3200, 128, 7)}
LONGEST = [("cut pairs", 300), ("cut pairs", 500)]


def chequered(rows, never=()):
    """Every weight with every second number of rows, in turn, so that each of these meets half of the weights; the rest
    and ``never``, which take long, in the whole grid.
    """
    for (i, name), (j, count) in itertools.product(enumerate([*WEIGHTS, *CUT]), enumerate(rows)):
        quick = (i + j) % 2 == 0 and (name, count) not in never
        yield pytest.param(name, count, marks=() if quick else pytest.mark.full)


def some_weight(name):
    """The weight and the number of SMs."""
    if name not in CUT:
        return WEIGHTS[name](), 5
    n, k, sms = CUT[name]
    weight = rl.tensor(n, k, seed=1)
    some = weight[::5, ::7]
    some.copy_(with_exponents(some.shape, range(60, 100)))
    return weight, sms


@pytest.fixture
def however_many(monkeypatch):
    """Weights are coded however many exceptions they have."""
    monkeypatch.setattr(coded_blocks, "MOST_EXCEPTIONS", 4096)


def decoded(packed, num_blocks, leading_only=False):
    """Bits ``[blocks, 64 features, 64 inputs]`` of coded blocks, decoded as csrc/cuda/coded_block.cuh describes."""
    everything = packed.view(torch.uint8).numpy()
    words, blocks = everything.view(np.uint32), everything[: num_blocks * BYTES].reshape(num_blocks, BYTES)
    out = np.zeros((num_blocks, 64, 64), dtype=np.uint16)
    for block, bits in zip(blocks, out, strict=True):
        head, (codes, leading, trailing) = block[:64].view(np.uint32), block[64:].view(np.uint32).reshape(3, 128, 4)
        listed, count, elsewhere = head[4:], head[2], head[3]
        taken = listed[:count] if count <= LISTED else words[elsewhere : elsewhere + count]
        taken = {exception >> 16: exception & 0xFFFF for exception in taken.tolist()}
        assert len(taken) == count
        for t in range(128):
            for step in range(4):
                code, high, low = (
                    [int(words[t, step]) >> 4 * i & 15 for i in range(8)] for words in (codes, leading, trailing)
                )
                for e in range(8):
                    at = 2 * e + 1 if e < 4 else 2 * (e - 4)
                    last = 8 if leading_only else low[2 * e if e < 4 else 2 * ((e - 5) % 4) + 1]
                    value = code[at] >> 3 << 15 | int(block[code[e] & 7]) << 8 | high[at] << 4 | last
                    register = 4 * step + e // 2
                    value = taken.get(t | register << 7 | e % 2 << 11, value)
                    feature = t // 32 * 16 + t % 32 // 4 + e // 2 % 2 * 8
                    bits[feature, 16 * step + t % 4 * 2 + e % 2 + e // 4 * 8] = value
    return out


@functools.cache
def draft_weights(name):
    """Of both views, what drafts see of :func:`some_weight` and of its mirror image."""
    weight, _ = some_weight(name)
    n, k = weight.shape
    views = []
    for view in (weight, weight.flip(0)):
        blocks = view.view(n // 64, 64, k // 64, 64).transpose(1, 2)
        bits = decoded(coded_blocks.encode(blocks), n * k // 4096, leading_only=True).view(np.int16)
        views.append(torch.from_numpy(bits).view(torch.bfloat16).view(blocks.shape).transpose(1, 2).reshape(n, k))
    return views


@pytest.mark.usefixtures("however_many")
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_bit_comes_back(name):
    weight = WEIGHTS[name]()
    n, k = weight.shape
    blocks = weight.view(n // 64, 64, k // 64, 64).transpose(1, 2)
    packed, want = coded_blocks.encode(blocks), blocks.flatten(0, 1).view(torch.int16).numpy().view(np.uint16)
    assert (decoded(packed, len(want)) == want).all()
    assert packed.numel() % 16 == 0


@pytest.mark.usefixtures("however_many")
@pytest.mark.parametrize("name", WEIGHTS)
def test_8_bits_are_the_leading_parts(name):
    weight = WEIGHTS[name]()
    n, k = weight.shape
    whole, short = (
        coded_blocks.encode(weight.view(n // 64, 64, k // 64, 64).transpose(1, 2), bits) for bits in (12, 8)
    )
    count = n * k // 4096
    want, got = whole[: count * BYTES].view(count, BYTES)[:, :LEADING], short[: count * LEADING].view(count, LEADING)
    elsewhere = slice(12, 16)
    moved = (each[:, elsewhere].contiguous().view(torch.int32) for each in (want, got))
    assert (next(moved) - next(moved) == count * (BYTES - LEADING) // 4).all()
    want[:, elsewhere] = got[:, elsewhere]
    assert torch.equal(want, got) and torch.equal(whole[count * BYTES :], short[count * LEADING :])


@pytest.mark.usefixtures("however_many")
def test_blocks_are_coded_in_any_number_at_a_time(monkeypatch):
    blocks = torch.stack([spread(n) for n in (0, 40, 12, 13, 100, 7, 64, 5)]).view(4, 2, 64, 64)
    want = [coded_blocks.encode(blocks, bits) for bits in (12, 8)]
    for at_once in (1, 5, 6):
        monkeypatch.setattr(coded_blocks, "AT_ONCE", at_once)
        assert all(torch.equal(coded_blocks.encode(blocks, bits), w) for bits, w in zip((12, 8), want, strict=True))


@pytest.mark.parametrize(("bits", "block", "share"), [(12, BYTES, 0.76), (8, LEADING, 0.51)])
def test_size(bits, block, share):
    weight = torch.randn(640, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    coded = coded_blocks.encode(weight.view(16, 10, 64, 64), bits)
    assert 0 <= coded.numel() - 160 * block <= 16 and coded.numel() < share * weight.nbytes


def test_bytes_that_are_read(host, monkeypatch):
    """Rows that pad the last block are included."""
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    packed = pack(rl.tensor(200, 192, seed=1))
    assert packed.coded and packed.read_bytes() == packed.nbytes == 12 * BYTES
    assert packed.read_bytes(exact=False) == 12 * LEADING
    short = pack(rl.tensor(200, 192, seed=1), bits=8)
    assert short.bits == 8 and short.nbytes == short.read_bytes() == short.read_bytes(exact=False) == 12 * LEADING


@pytest.mark.full
@pytest.mark.usefixtures("wheel")
def test_exceptions_of_the_embedded_model():
    """They are as rare as csrc/cuda/coded_block.cuh says."""
    matrices = [tensor.bfloat16() for tensor in load("smollm2-135m").tensors.values() if tensor.dim() == 2]
    coded = [coded_blocks.encode(cuda_blocks(matrix, gate_up=False)) for matrix in matrices]
    blocks = [data[: data.numel() // BYTES * BYTES].view(-1, BYTES) for data in coded]
    count = torch.cat([part[:, 8:12].contiguous().view(torch.int32)[:, 0] for part in blocks])
    assert 3.5e-5 < count.sum() / (4096 * len(count)) < 4.5e-5
    assert 0.935 < (count == 0).float().mean() < 0.945


def test_weights_with_too_many_exceptions_stay_plain(host, monkeypatch):
    monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
    few, many = torch.cat([spread(4), spread(0)], 1), torch.cat([spread(4), spread(1)], 1)
    assert pack(few).coded and not pack(many).coded
    assert [w.bits for w in pack_views(few, few)] == [12, 8]
    for views in ((few, many), (many, few), (many, many)):
        assert [w.bits for w in pack_views(*views)] == [16, 16]


def bits(out):
    """The output as integers, so that NaN equals itself."""
    outs = out if isinstance(out, tuple) else (out,)
    return [t.view(torch.int16 if t.dtype is torch.bfloat16 else torch.int32) for t in outs]


@pytest.mark.usefixtures("host")
class TestRowLinear:
    @pytest.fixture(params=["sm90", "sm80"], autouse=True)
    def isa(self, request, monkeypatch):
        monkeypatch.setenv("ORTHRUS_CUDA_ISA", request.param)
        return request.param

    @pytest.mark.usefixtures("however_many")
    @pytest.mark.parametrize(("name", "rows"), chequered([*ROWS, 170, 300, 500], LONGEST))
    def test_no_bit_differs_from_plain_weights(self, name, rows, monkeypatch):
        """This is why the tests of row_linear itself run few of their cases with coded weights."""
        weight, sms = some_weight(name)
        n, k = weight.shape
        x, diff = rl.tensor(rows, k, seed=2), weight.flip(0)
        residual = rl.tensor(rows, n, seed=3)

        def everything(coded):
            monkeypatch.setenv("ORTHRUS_CUDA_CODED", coded)
            views = dict(diff=diff, num_rows_ar=rows // 3)
            return [
                *bits(rl.run(x, weight, "residual", residual=residual, sms=sms, **views)),
                *bits(rl.run(x, weight, "argmax", sms=sms)), *bits(rl.run(x, weight, "silu_mul", sms=sms)),
            ]  # fmt: skip

        assert all(torch.equal(a, b) for a, b in zip(everything("0"), everything("1"), strict=True))

    @pytest.mark.usefixtures("however_many")
    @pytest.mark.parametrize(("name", "rows"), chequered([1, 40, 90, 300]))
    def test_drafts_take_the_middle_for_what_trails(self, name, rows, monkeypatch):
        """Weights that drafts use are at most a sixteenth off, unless tiny, and the trailing bits are not used."""
        (weight, sms), plain = some_weight(name), draft_weights(name)
        n, k = weight.shape
        usual = weight.float().abs().nan_to_num(posinf=0) > 2.0**-120
        assert ((plain[0].float() / weight.float() - 1).abs()[usual] <= 1 / 16).all()
        monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
        views = [pack(w) for w in (weight, weight.flip(0))]
        for view in views:
            view.data.view(torch.uint8)[: n * k // 4096 * BYTES].view(-1, BYTES)[:, LEADING:] = 0xFF
        x, residual = rl.tensor(rows, k, seed=2), rl.tensor(rows, n, seed=3)
        how = dict(residual=residual, num_rows_ar=rows // 3, sms=sms)
        got = rl.run(x, views[0], "residual", diff=views[1], exact=False, **how)
        monkeypatch.setenv("ORTHRUS_CUDA_CODED", "0")
        for exact in (True, False):  # of plain weights, drafts read every bit too
            want = rl.run(x, plain[0], "residual", diff=plain[1], exact=exact, **how)
            assert torch.equal(*bits(got), *bits(want))

    @pytest.mark.usefixtures("however_many")
    @pytest.mark.parametrize(("name", "rows"), chequered([4, 40, 90, 300, 500], LONGEST))
    def test_the_diffusion_view_in_8_bits_beside_exact_rows(self, name, rows, monkeypatch):
        """As in a pass that verifies and drafts at once; then all rows are of one view."""
        weight, sms = some_weight(name)
        n, k = weight.shape
        x, residual = rl.tensor(rows, k, seed=2), rl.tensor(rows, n, seed=3)
        for rows_ar in (rows // 3, 0, rows):
            how = dict(residual=residual, num_rows_ar=rows_ar, sms=sms)
            monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
            views = pack(weight), pack(weight.flip(0), bits=8)
            assert [view.bits for view in views] == [12, 8]
            exact = (True,) if rows_ar else (True, False)
            got = [rl.run(x, views[0], "residual", diff=views[1], exact=e, **how) for e in exact]
            monkeypatch.setenv("ORTHRUS_CUDA_CODED", "0")
            want = rl.run(x, weight, "residual", diff=draft_weights(name)[1], **how)
            assert all(torch.equal(*bits(each), *bits(want)) for each in got)

    def test_what_follows_may_be_plain(self, isa, monkeypatch):
        weight, x = rl.tensor(3200, 256, seed=1), rl.tensor(4, 256, seed=2)
        want = rl.run(x, weight)
        for coded, then in (("0", "1"), ("1", "0")):
            monkeypatch.setenv("ORTHRUS_CUDA_CODED", then)
            following = pack(weight)
            monkeypatch.setenv("ORTHRUS_CUDA_CODED", coded)
            assert torch.equal(rl.run(x, weight, next_weight=following), want)
            begin = following.data.data_ptr()
            ends = map(ctypes.c_void_p, (begin, begin + following.nbytes))
            assert (rl.library().row_linear_prefetched(*ends, following.bits, False) > 0) == (isa == "sm90")

    def test_views_are_packed_alike(self, monkeypatch):
        weight, x, out = rl.tensor(128, 64), rl.tensor(2, 64), torch.empty(2, 128, dtype=torch.bfloat16)
        plain = pack(weight)
        monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
        coded = pack(weight)
        space = dict(workspace=rl.workspace(2, 64, 128, 5), num_rows_ar=1)
        for a, b in ((plain, coded), (coded, plain)):
            with pytest.raises(ValueError, match=r"row_linear: weight_diff must be .*'coded': .*, got .*'coded': "):
                ops.row_linear(x, a, out, weight_diff=b, **space)
            with pytest.raises(AssertionError, match=f"row_linear returned {INVALID}"):
                native.row_linear(x, a, out, weight_diff=b, **space)

    def test_room(self, monkeypatch, tmp_path):
        """The bytes that are required before loading do not count rows that pad the last block."""
        config = load_config(str(checkpoints.make(tmp_path, "qwen3", dtype=torch.bfloat16)))
        plain = room.least_weight_bytes(config, CPU, torch.bfloat16)
        monkeypatch.setenv("ORTHRUS_CUDA_CODED", "1")
        width = 2 * (config.num_heads_q + config.num_heads_kv) * config.head_dim  # of q, k, v and o
        own = 2 * config.num_layers * config.hidden_size * width
        assert room.least_weight_bytes(config, CPU, torch.bfloat16) == 0.75 * (plain - own) + 0.5 * own
        assert room.least_weight_bytes(config, CPU, torch.float32) == 2 * plain


def test_nobody_codes_unasked(monkeypatch):
    monkeypatch.delenv("ORTHRUS_CUDA_CODED", raising=False)
    assert not weights.codes_for_cuda()
    for value in ("", "0"):
        monkeypatch.setenv("ORTHRUS_CUDA_CODED", value)
        assert not weights.codes_for_cuda()
