"""Where an engine's memory goes. Everything is planned when the engine is made; decoding allocates nothing more."""

from __future__ import annotations


def memory_report(engine) -> dict[str, int]:
    """Bytes by use.

    ``weights`` (of the AR view, embedding included) and ``kv_pages`` are what AR decoding alone needs. The diffusion
    view adds ``weights_diffusion`` and ``scratch`` (one layer's keys and values of the block rows): neither grows with
    context. ``activations`` and ``workspace`` are sized by the most rows of a pass; ``graphs`` is what recorded CUDA
    graphs hold.
    """
    runner, sizes = engine.runner, engine.model.nbytes()
    scratch = sum(t.numel() * t.element_size() for t in (runner.activations.scratch_k, runner.activations.scratch_v))
    workspace = sum(t.numel() for t in (runner.workspace.linear, runner.workspace.attn) if t is not None)
    report = {
        "weights": sizes["ar"] + sizes["embedding"],
        "weights_diffusion": sizes["diffusion"],
        "kv_pages": runner.kv.nbytes,
        "scratch": scratch,
        "activations": runner.activations.nbytes - scratch,
        "workspace": workspace,
        "graphs": runner.graph_bytes,
    }
    return report | {"total": sum(report.values())}
