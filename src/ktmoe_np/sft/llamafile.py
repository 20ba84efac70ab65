"""Training on base weights that are blocks of GGUF."""

from __future__ import annotations

from ..layers.gguf import GgufWeights
from .amx import AMXSFTMoEWrapper

__all__ = ["LlamafileSFTMoEWrapper"]


class LlamafileSFTMoEWrapper(GgufWeights, AMXSFTMoEWrapper):
    """Experts with adapters on weights of GGUF: method ``LLAMAFILE_SFT``.

    Weights are referred to, never copied, and the backward pass reads the same bytes as the forward pass.
    """
