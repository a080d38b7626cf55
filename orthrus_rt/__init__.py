"""Lossless dual-view decoding: drafts from a diffusion view, verified by the autoregressive view of one model.

The names below are imported on first use: ``import orthrus_rt`` costs nothing and needs neither CUDA nor Triton.
"""

from importlib import import_module

_HOME = {
    "AsyncEngine": "aio",
    "CheckpointError": "config",
    "Engine": "engine",
    "GenerationOutput": "outputs",
    "ModelConfig": "config",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling",
    "Stats": "outputs",
    "TextStream": "text_stream",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"orthrus_rt.{_HOME[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("orthrus-rt")
    raise AttributeError(f"module 'orthrus_rt' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__, "__version__"])
