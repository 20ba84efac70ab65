"""Training on base weights that stay as the checkpoint has them."""

from __future__ import annotations

from ..layers.native import NativeWeights
from .amx import AMXSFTMoEWrapper

__all__ = ["NativeSFTMoEWrapper"]


class NativeSFTMoEWrapper(NativeWeights, AMXSFTMoEWrapper):
    """Experts with adapters on weights in a checkpoint's own encoding.

    Methods ``AMXBF16_SFT``, ``AMXFP8_SFT``, ``FP8_PERCHANNEL_SFT``, ``MXFP8_SFT``, ``RAWINT4_SFT``,
    ``GPTQ_INT4_SFT``, ``MXFP4_SFT`` and ``NVFP4_SFT``.

    Weights are referred to, never copied (those of ``GPTQ_INT4_SFT`` are converted once), and the backward
    pass reads the same bytes as the forward pass.
    """
