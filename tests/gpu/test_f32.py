"""The float32 CUDA kernels: against float64, bitwise whatever shares the pass, and a whole model against the CPU."""

import pytest
import torch

from orthrus_rt import ops, weights
from orthrus_rt.engine import Engine
from tests import checkpoints
from tests.attention_pass import Heads, Pass
from tests.gpu.test_dual_attn import PASSES

pytestmark = pytest.mark.gpu
HEADS = [Heads(32, 8, 128), Heads(9, 3, 64)]


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def logits(x, weight, **views):
    out = torch.full((x.shape[0], weight.out_features), torch.nan, device="cuda")
    ops.row_linear(x, weight, out, epilogue="logits", **views)
    return out


@pytest.mark.parametrize("shape", [(700, 576), (130, 70), (6144, 2048)], ids=str)
def test_row_linear(shape):
    plain, x = tensor(*shape, seed=1), tensor(200, shape[1], seed=2)
    weight, diff = weights.pack(plain), weights.pack(tensor(*shape, seed=3))
    whole = logits(x, weight)
    exact = x.double() @ plain.double().T
    bound = (x.double().abs() @ plain.double().abs().T) * (shape[1] + 4) * 2.0**-24
    assert ((whole.double() - exact).abs() <= bound).all()
    for n in (1, 16, 33):
        assert torch.equal(logits(x[5 : 5 + n], weight), whole[5 : 5 + n])
    both = logits(x, weight, weight_diff=diff, num_rows_ar=77)
    assert torch.equal(both[:77], whole[:77])
    assert torch.equal(both[77:], logits(x[77:], diff))
    residual = tensor(200, shape[0], seed=4)
    out = torch.empty_like(residual)
    ops.row_linear(x, weight, out, residual=residual, epilogue="residual")
    assert torch.equal(out, whole + residual)
    gated = weights.pack(plain, gate_up=True)
    out = torch.empty(200, shape[0] // 2, device="cuda")
    ops.row_linear(x, gated, out, epilogue="silu_mul")
    gate, up = whole.double().chunk(2, 1)
    torch.testing.assert_close(out.double(), gate * gate.sigmoid() * up, rtol=1e-5, atol=1e-5)
    value, index = (torch.empty(200, weight.num_partials, dtype=t, device="cuda") for t in (torch.float32, torch.int32))
    ops.row_linear(x, weight, (value, index), epilogue="argmax")
    assert torch.equal(value.amax(1), whole.amax(1))
    assert torch.equal(whole.gather(1, index.long()), value)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_dual_attn(name, heads):
    case = Pass(heads, PASSES[name], dtype=torch.float32)
    got = case.run()
    torch.cuda.synchronize()
    torch.testing.assert_close(got.double(), case.expected(), rtol=1e-5, atol=2e-6)
    assert not got[case.rows.position < 0].any()
    backwards = Pass(heads, PASSES[name][::-1], dtype=torch.float32)
    for group, rows in backwards.by_group(backwards.run()).items():
        assert torch.equal(rows, case.by_group(got)[group])


@pytest.mark.parametrize("family", ("qwen3", "llama"))
def test_a_model_agrees_with_the_cpu(family, tmp_path):
    folder = str(checkpoints.make(tmp_path, family))
    ids = list(range(90))
    rows = []
    for device in ("cpu", "cuda"):
        engine = Engine.from_pretrained(folder, device=device, dtype="float32", max_seq_len=128)
        rows.append(engine.next_logits(ids).cpu())
        engine.close()
    assert (rows[0] - rows[1]).abs().max() <= 1e-5 * rows[0].abs().max()
