"""Layers whose weights stay as the checkpoint has them."""

from __future__ import annotations

from ..layers.native import NativeWeights
from .base import BaseMoEWrapper

__all__ = ["NativeMoEWrapper"]


class NativeMoEWrapper(NativeWeights, BaseMoEWrapper):
    """Experts computed from a checkpoint's own encoding.

    Methods ``BF16``, ``FP8``, ``FP8_PERCHANNEL``, ``MXFP8``, ``RAWINT4``, ``GPTQ_INT4``, ``MXFP4`` and
    ``NVFP4``.

    Weights are referred to, never copied: arrays stay the caller's, files stay mapped. Those of
    ``GPTQ_INT4``, whose rows do not lie together, are converted once.
    """
