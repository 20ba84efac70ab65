"""The layers of experts for inference, a module a family of methods."""

from .base import BaseMoEWrapper
from .native import NativeMoEWrapper

__all__ = ["BaseMoEWrapper", "NativeMoEWrapper"]
