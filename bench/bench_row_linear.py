"""row_linear, op by op and chained over a model's layers in a CUDA graph, compared with torch.mm.

    python -m bench.bench_row_linear --model 8b --rows 1 16 32 64 96 128 160 224 2000 --out DIR

Every layer has its own weights, so nothing is read from a cache except what a launch has prefetched to L2 for the next
one. Bytes are the packed weights alone, with ``ORTHRUS_CUDA_CODED=1`` in 12 bits an element, of which ``--draft`` reads
8, as many as the diffusion view's own weights have. On a CPU, runs of torch.mm and the op are interleaved.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from bench.common import header, loop, measure_in_turns, parser_of, read_bandwidth, report, run_script, save
from bench.models import SHAPES, config_of, linear_shapes
from orthrus_rt import huge_pages, native, ops, room
from orthrus_rt.coded_blocks import CODED_BITS, DRAFT_BITS
from orthrus_rt.weights import PackedWeight, pack

OPS = ("qkv", "o", "gate_up", "down", "lm_head")
EPILOGUES = {"qkv": "none", "o": "residual", "gate_up": "silu_mul", "down": "residual", "lm_head": "argmax"}


class Chain:
    """A model's linears with random weights, and the activations they pass on for a number of rows."""

    def __init__(
        self, model: str, device: torch.device, layers: int | None, diff: bool, baseline: bool, exact: bool = True
    ):
        config, self.device, self.exact = config_of(model), device, exact
        self.shapes = shapes = linear_shapes(config)
        self.hidden, self.mlp = config.hidden_size, config.intermediate_size
        self.layers = layers or config.num_layers
        self._check_room(model, diff, baseline)
        self.weights = {op: [self._random(op, shapes[op]) for _ in range(self.layers)] for op in OPS[:-1]}
        self.weights["lm_head"] = [self._random("lm_head", shapes["lm_head"])]
        self.diff = {
            op: [self._random(op, shapes[op], DRAFT_BITS) for _ in range(self.layers)] for op in ("qkv", "o") if diff
        }
        self.plain: dict[tuple[str, int], torch.Tensor] = {}

    def _check_room(self, model: str, diff: bool, baseline: bool) -> None:
        def nbytes(*names):
            return 2 * sum(math.prod(self.shapes[op]) * (1 if op == "lm_head" else self.layers) for op in names)

        weights, views = nbytes(*OPS), nbytes("qkv", "o") * diff
        need = weights + views
        if room.are_coded(self.device, torch.bfloat16):  # torch.mm needs plain ones in addition
            need = (CODED_BITS * weights + DRAFT_BITS * views) // 16 + weights * baseline
        what = f"{self.layers} layers of {model} (--layers for fewer)"
        room.check_left(what, need, self.device, torch.bfloat16)

    def _random(self, op: str, shape, bits: int = CODED_BITS) -> PackedWeight:
        weight = torch.empty(*reversed(shape), dtype=torch.bfloat16, device=self.device).normal_(0, shape[0] ** -0.5)
        return pack(weight, gate_up=op == "gate_up", bits=bits)

    def rows(self, num_rows: int) -> None:
        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device=self.device)

        head = self.weights["lm_head"][0]
        self.num_rows = num_rows
        self.x, self.residual = (empty(num_rows, self.hidden).normal_() for _ in range(2))
        self.qkv, self.act = empty(num_rows, self.shapes["qkv"][1]), empty(num_rows, self.mlp)
        self.attn = empty(num_rows, self.shapes["o"][0]).normal_()
        self.best = tuple(empty(num_rows, head.num_partials, dtype=t) for t in (torch.float32, torch.int32))
        self.wide = empty(num_rows, 2 * self.mlp)
        self.logits = None
        self.workspace = self._workspace(num_rows, self.shapes.values())

    def _workspace(self, num_rows: int, shapes) -> torch.Tensor:
        size = native.row_linear_workspace_bytes(self.device, torch.bfloat16, num_rows, shapes)
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def run(self, op: str, layer: int, following=None) -> None:
        """``following``: op and layer of the next launch, if any."""
        weight = self.weights[op][layer]
        next_weight = None
        if following and following[0] != "lm_head":  # as in the model
            first = self.diff if following[0] in self.diff and self.num_rows < 2 else self.weights
            next_weight = first[following[0]][following[1]]
        inputs = {"o": self.attn, "down": self.act}.get(op, self.x)
        out = {"qkv": self.qkv, "gate_up": self.act, "lm_head": self.best}.get(op, self.x)
        views = dict(weight_diff=self.diff[op][layer], num_rows_ar=self.num_rows // 2) if op in self.diff else {}
        # Not self.x, which would grow from layer to layer and end as NaN: products of those may be faster.
        residual = self.residual if EPILOGUES[op] == "residual" else None
        rest = dict(residual=residual, epilogue=EPILOGUES[op], workspace=self.workspace, exact=self.exact)
        ops.row_linear(inputs, weight, out, next_weight=next_weight, **rest, **views)

    def run_mm(self, op: str, layer: int, following=None) -> None:
        """The same product by torch, without epilogue, over the packed bytes read as a plain matrix, or over another
        matrix if the bytes are coded.
        """
        k, n = self.shapes[op]
        packed = self.weights[op][layer]
        if packed.coded and (op, layer) not in self.plain:
            self.plain[op, layer] = huge_pages.empty([n, k], torch.bfloat16, self.device).normal_(0, k**-0.5)
        weight = self.plain[op, layer] if packed.coded else packed.data.view(-1, k)[:n]
        inputs = {"o": self.attn, "down": self.act}.get(op, self.x)
        if op == "lm_head":
            if self.logits is None:
                self.logits = torch.empty(self.num_rows, n, dtype=torch.bfloat16, device=self.device)
            torch.mm(inputs, weight.T, out=self.logits)
        else:
            torch.mm(inputs, weight.T, out={"qkv": self.qkv, "gate_up": self.wide}.get(op, self.x))

    def order(self, op: str | None = None) -> list[tuple[str, int]]:
        """Ops and layers of every launch, or of the launches of one op."""
        whole = [(each, layer) for layer in range(self.layers) for each in OPS[:-1]] + [("lm_head", 0)]
        return [launch for launch in whole if op in (None, launch[0])]

    def nbytes(self, op: str) -> int:
        of_views = [self.weights[op][0]] if op not in self.diff or self.num_rows > 1 else []
        of_views += [self.diff[op][0]] if op in self.diff else []
        return sum(weight.read_bytes(self.exact) for weight in of_views)

    def max_error(self, op: str) -> float:
        """Largest error compared with float64, relative to the largest value; 0.004 is a bf16 rounding. A draft's
        coded weights are up to a sixteenth off. At most 8192 outputs.
        """
        k, n = self.shapes[op][0], min(self.shapes[op][1], 8192)
        plain, x = (torch.randn(rows, k, device=self.device).bfloat16() for rows in (n, min(self.num_rows, 64)))
        packed = pack(plain)
        out = torch.empty(x.shape[0], n, dtype=torch.bfloat16, device=self.device)
        ops.row_linear(x, packed, out, workspace=self._workspace(x.shape[0], [(k, n)]), exact=self.exact)
        want = x.double() @ plain.double().T
        return float((out.double() - want).abs().max() / want.abs().max())


def in_turn(run, order: list[tuple[str, int]]) -> None:
    for launch, following in zip(order, [*order[1:], None], strict=True):
        run(*launch, following)


def main() -> int:
    parser = parser_of(__doc__, device="auto")
    parser.add_argument("--model", default="8b", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 64, 96, 128, 160, 224, 2000])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--diff", action="store_true", help="half of the rows use the diffusion view's qkv and o")
    kind.add_argument("--draft", action="store_true", help="as in a pass that only drafts, with inexact coded weights")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--loop", choices=OPS, help="run this op in a loop, for a profiler")
    args = parser.parse_args()
    device = args.device
    baseline = not (args.no_baseline or args.loop)
    chain = Chain(args.model, device, args.layers, args.diff, baseline, exact=not args.draft)
    if args.loop:
        chain.rows(args.rows[0])
        order = chain.order(args.loop)
        loop(f"row_linear/{args.loop}", partial(in_turn, chain.run, order * max(1, 1000 // len(order))), 1)
        return 0
    bandwidth, results = read_bandwidth(device), []
    facts = header(device) | {"measured read GB/s": bandwidth, "model": args.model, "layers": chain.layers}
    name = f"row_linear_{args.model}{'_diff' if args.diff else '_draft' if args.draft else ''}_{device.type}"
    for num_rows in args.rows:
        chain.rows(num_rows)

        def add(op, run, run_mm, nbytes, flops, count, error):
            runs = {"own": run} if args.no_baseline else {"own": run, "torch.mm": run_mm}
            times = measure_in_turns(runs, device, repeats=args.repeats)
            took, base = times["own"], times["torch.mm"]["p50"] if "torch.mm" in times else None
            us = took["p50"] / count
            results.append({
                "op": op, "impl": chain.weights["qkv"][0].impl, "rows": num_rows, "dtype": "bf16",  # noqa: B023
                "us p50": us, "us p20": took["p20"] / count, "us p80": took["p80"] / count,
                "GB/s": nbytes / count / us * 1e-3, "share of read bandwidth": nbytes / count / us * 1e-3 / bandwidth,
                "TFLOP/s": flops / count / us * 1e-6, "torch.mm us": base and base / count,
                "torch.mm / own": base and base / took["p50"], "max error": error,
            })  # fmt: skip

        for op in OPS:
            depth = len(chain.weights[op])
            k, n = chain.shapes[op]
            add(
                op,
                partial(in_turn, chain.run, chain.order(op)),
                partial(in_turn, chain.run_mm, chain.order(op)),
                chain.nbytes(op) * depth, 2 * num_rows * n * k * depth, depth, chain.max_error(op),
            )  # fmt: skip
        total = sum(chain.nbytes(op) * len(chain.weights[op]) for op in OPS)
        flops = sum(2 * num_rows * n * k * len(chain.weights[op]) for op, (k, n) in chain.shapes.items())
        both = (partial(in_turn, run, chain.order()) for run in (chain.run, chain.run_mm))
        add("chain", *both, total, flops, 1, None)
        save(name, facts, results, args.out)
    report(name, facts, results, args.out)
    return 0


if __name__ == "__main__":
    run_script(main)
