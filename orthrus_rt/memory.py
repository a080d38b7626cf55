"""Where an engine's memory goes.

Weights and cache are allocated once. So are activations and workspace, but again when a call asks for larger cycles.
Logits, edits, and each cycle or shape of prefill with its graph are allocated at their first use; of cycles and shapes
only a limited number is kept. After that, decoding allocates nothing more that lasts. The host's part of a cycle with
``acceptance="rejection"`` allocates and frees its memory each time.

Not counted on the CPU, as each thread keeps one buffer, as large as the largest use of it. In the thread that calls:
attention's partial results, fp32 ``[splits, rows, num_heads_q, head_dim + 2]``, if all threads share a few rows (a
split is 512 positions; at most 128 MB), and, if the processor has no bf16 dot products, a float copy of a block of a
pass's rows (256 KB or 48 rows, whichever is more). In every thread: fp32 values of a row of logits, if it is sampled
from, and a strip of unpacked weights (64 bytes per input).
"""

from __future__ import annotations


def memory_report(engine) -> dict[str, int]:
    """Bytes by use.

    ``weights`` (of the AR view, embedding included), ``kv_pages`` and ``tables`` (rotary angles, page table) are what
    AR decoding alone needs; the last two grow with context. The diffusion view adds ``weights_diffusion``, ``scratch``
    (one layer's keys and values of the block rows) and, in ``activations``, one layer's buffers of these rows and the
    verified rows' choices (greedy: partial maxima instead of logits). ``activations`` and ``workspace`` are sized for
    the most rows of a pass, those of a cycle and of a chunk of prompts. On CUDA ``workspace`` includes attention's
    partial results of these rows, which also grow with ``max_seq_len``, up to 512 MB. ``activations`` grows by the
    logits of a cycle's rows and of one row per slot at the first request that samples or edits logits, or when a
    warm-up includes sampling. ``edits`` is what penalties, bias and min_tokens need, once a request has used any.
    ``cycles`` and ``graphs`` belong to the cycles and recorded passes with prompts built so far: their rows, and what
    torch keeps for CUDA graphs (the driver keeps some more for their launches). ``total`` is the sum.
    """
    runner, sizes = engine.runner, engine.model.nbytes()
    scratch = runner.activations.scratch_k.nbytes + runner.activations.scratch_v.nbytes
    workspace = sum(t.nbytes for t in (runner.workspace.linear, runner.workspace.attn) if t is not None)
    tables = engine.model.cos_sin.nbytes + runner.kv.page_table.nbytes
    report = {
        "weights": sizes["ar"] + sizes["embedding"],
        "weights_diffusion": sizes["diffusion"],
        "kv_pages": runner.kv.nbytes,
        "tables": tables,
        "scratch": scratch,
        "activations": runner.activations.nbytes - scratch,
        "workspace": workspace,
        "edits": runner.sampling.edits.nbytes if runner.sampling.edits else 0,
        "cycles": runner.cycle_bytes,
        "graphs": runner.graph_bytes,
    }
    return report | {"total": sum(report.values())}
