"""What runs where: the facts that ``orthrus-rt info`` prints and that benchmarks put on their results."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from orthrus_rt import dispatch
from orthrus_rt.config import CheckpointError
from orthrus_rt.device import DTYPES, device_scope, pick_device
from orthrus_rt.versions import installed

PACKAGES = ("orthrus-rt", "torch", "triton", "transformers", "safetensors", "gguf", "numpy")


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_name(cpuinfo: str) -> str:
    """The first processor's name with family and model: virtual ones of several generations may share a name."""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    keys = {"family": "cpu family", "model": "model", "implementer": "CPU implementer", "part": "CPU part"}
    numbers = [f"{name} {facts[key]}" for name, key in keys.items() if key in facts]
    return facts.get("model name", platform.machine()) + (f" ({', '.join(numbers)})" if numbers else "")


def device_facts(device: torch.device) -> dict:
    native = dispatch.extension()
    if device.type == "cuda":
        with device_scope(device):
            isa = native.cuda.isa() if hasattr(native, "cuda") else None
        p = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda", "name": p.name, "capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1), "isa": isa,
        }  # fmt: skip
    isa = native.cpu.isa() if native else None
    return {"type": "cpu", "name": cpu_name(_cpuinfo()), "isa": isa, "threads": torch.get_num_threads()}


def model_facts(model: str, adapter: str | None, base_gguf: str | None) -> dict:
    """Facts from config.json; in folders the headers of the weights are checked too. No weights are downloaded.

    Raises:
        CheckpointError: the model cannot be opened.
    """
    from orthrus_rt import checkpoint

    if any(source and checkpoint.is_hub_id(source) for source in (model, adapter)):
        c = checkpoint.load_config(model, adapter=adapter, base_gguf=base_gguf)
    else:
        c = checkpoint.load(model, adapter=adapter, base_gguf=base_gguf).config
    names = (
        "family", "num_layers", "hidden_size", "intermediate_size", "num_heads_q", "num_heads_kv", "head_dim",
        "vocab_size", "max_position_embeddings", "block_len", "mask_token_id", "eos_token_ids",
    )  # fmt: skip
    return {"name": c.name} | {name: getattr(c, name) for name in names}


def collect(*, device: str, dtype: str, model: str, adapter: str | None = None, base_gguf: str | None = None) -> dict:
    """Everything as one dictionary of plain values. A model that cannot be opened is reported, not raised."""
    chosen = pick_device(device)
    native = dispatch.extension()
    facts = {
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
        "native": dict(native.build_info()) if native else None,
        "why_no_native": dispatch.why_no_native(),
        "device": device_facts(chosen),
        "dtype": dtype,
        "ops": {op: dispatch.select(op, chosen, DTYPES[dtype]) for op in dispatch.OPS},
        "ops_available": {
            op: [i for i in dispatch.IMPLEMENTATIONS if dispatch.unavailable(i, op, chosen, DTYPES[dtype]) is None]
            for op in dispatch.OPS
        },
    }
    try:
        facts["model"] = model_facts(model, adapter, base_gguf)
    except CheckpointError as error:
        facts["model"] = {"name": model, "error": str(error)}
    return facts
