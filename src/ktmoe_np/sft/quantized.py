"""Training on quantised base weights."""

from __future__ import annotations

from ..layers.quantized import QuantizedWeights
from .amx import AMXSFTMoEWrapper

__all__ = ["QuantizedSFTMoEWrapper"]


class QuantizedSFTMoEWrapper(QuantizedWeights, AMXSFTMoEWrapper):
    """Experts with adapters on quantised weights.

    Methods ``AMXINT8_SFT``, ``AMXINT4_SFT``, ``MOE_INT8_SFT`` and ``MOE_INT4_SFT`` compute what those without
    ``_SFT`` do, from the same files, and add adapters, which take activations in bf16. The backward pass
    reads the same bytes as the forward pass, each weight as bf16(code * scale). Quantised weights have no
    gradients.
    """
