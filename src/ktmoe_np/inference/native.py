"""Layers whose weights stay as the checkpoint has them."""

from __future__ import annotations

from ..layer import NativeWeights
from .base import BaseMoEWrapper

__all__ = ["NativeMoEWrapper"]


class NativeMoEWrapper(NativeWeights, BaseMoEWrapper):
    """Experts computed from a checkpoint's own encoding: method ``BF16``.

    Weights are referred to, never copied: arrays stay the caller's, files stay mapped.
    """
