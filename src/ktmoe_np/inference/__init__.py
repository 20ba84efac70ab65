"""The layers of experts for inference, and the base that they share."""

from .base import BaseMoEWrapper
from .wrappers import AMXMoEWrapper, GeneralMoEWrapper, LlamafileMoEWrapper, NativeMoEWrapper

__all__ = [
    "AMXMoEWrapper",
    "BaseMoEWrapper",
    "GeneralMoEWrapper",
    "LlamafileMoEWrapper",
    "NativeMoEWrapper",
]
