"""The layers of experts for inference, a module a family of methods."""

from .amx import AMXMoEWrapper
from .base import BaseMoEWrapper
from .general import GeneralMoEWrapper
from .llamafile import LlamafileMoEWrapper
from .native import NativeMoEWrapper

__all__ = [
    "AMXMoEWrapper",
    "BaseMoEWrapper",
    "GeneralMoEWrapper",
    "LlamafileMoEWrapper",
    "NativeMoEWrapper",
]
