"""Lossless dual-view decoding: drafts from a diffusion view, verified by the autoregressive view of one model.

The names below are imported on first use: ``import orthrus_rt`` costs nothing and needs neither CUDA nor Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # the same names for type checkers and editors
    from orthrus_rt.aio import AsyncEngine as AsyncEngine
    from orthrus_rt.config import CheckpointError as CheckpointError
    from orthrus_rt.config import ModelConfig as ModelConfig
    from orthrus_rt.engine import Engine as Engine
    from orthrus_rt.outputs import GenerationOutput as GenerationOutput
    from orthrus_rt.outputs import RequestOutput as RequestOutput
    from orthrus_rt.outputs import Stats as Stats
    from orthrus_rt.sampling import SamplingParams as SamplingParams
    from orthrus_rt.text_stream import TextStream as TextStream

    __version__: str
else:

    def __getattr__(name):
        if name in _HOME:
            return getattr(import_module(f"orthrus_rt.{_HOME[name]}"), name)
        if name == "__version__":
            return import_module("orthrus_rt.versions").own()
        raise AttributeError(f"module 'orthrus_rt' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__, "__version__"])
