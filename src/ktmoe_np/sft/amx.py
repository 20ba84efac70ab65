"""What all layers for training share beside their weights: the class of the extension that computes them."""

from __future__ import annotations

from .base import BaseSFTMoEWrapper

__all__ = ["AMXSFTMoEWrapper"]


class AMXSFTMoEWrapper(BaseSFTMoEWrapper):
    """A layer for training that is computed by ``AMX_SFT_MOE_TP``: the base of the wrappers of all methods.

    ``AMX`` names the family of kernels, not the instruction set. `NativeSFTMoEWrapper`,
    `QuantizedSFTMoEWrapper` and `LlamafileSFTMoEWrapper` add how weights are held.
    """
