"""Training on base weights that stay as the checkpoint has them."""

from __future__ import annotations

from ..layer import NativeWeights
from .base import BaseSFTMoEWrapper

__all__ = ["AMXSFTMoEWrapper"]


class AMXSFTMoEWrapper(NativeWeights, BaseSFTMoEWrapper):
    """Experts with adapters on bf16 weights: method ``AMXBF16_SFT``.

    Weights are referred to, never copied, and the backward pass reads the same bytes as the forward pass.
    """
