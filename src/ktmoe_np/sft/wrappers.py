"""The wrappers of layers for training: one per kind of weights, and their base."""

from __future__ import annotations

from ..layers.gguf import GgufWeights
from ..layers.native import NativeWeights
from ..layers.quantized import QuantizedWeights
from .base import BaseSFTMoEWrapper

__all__ = ["AMXSFTMoEWrapper", "LlamafileSFTMoEWrapper", "NativeSFTMoEWrapper", "QuantizedSFTMoEWrapper"]


class AMXSFTMoEWrapper(BaseSFTMoEWrapper):
    """A layer for training that is computed by ``AMX_SFT_MOE_TP``: the base of the wrappers of all methods.

    ``AMX`` names the family of kernels, not the instruction set. `NativeSFTMoEWrapper`,
    `QuantizedSFTMoEWrapper` and `LlamafileSFTMoEWrapper` add the kind of weights.
    """


class QuantizedSFTMoEWrapper(QuantizedWeights, AMXSFTMoEWrapper):
    """Experts with adapters on quantized weights.

    Methods ``AMXINT8_SFT``, ``AMXINT4_SFT``, ``MOE_INT8_SFT`` and ``MOE_INT4_SFT`` compute what those without
    ``_SFT`` do, from the same files, and add adapters, which take activations in bf16. The backward pass
    reads the same bytes as the forward pass, each weight as bf16(code * scale). Quantized weights have no
    gradients.
    """


class LlamafileSFTMoEWrapper(GgufWeights, AMXSFTMoEWrapper):
    """Experts with adapters on GGUF weights: method ``LLAMAFILE_SFT``.

    Weights are never copied, and the backward pass reads the same bytes as the forward pass.
    """


class NativeSFTMoEWrapper(NativeWeights, AMXSFTMoEWrapper):
    """Experts with adapters on weights in a checkpoint's own encoding.

    Methods ``AMXBF16_SFT``, ``AMXFP8_SFT`` and others, those of `NativeMoEWrapper` with ``_SFT``.

    Weights are referred to, never copied (those of ``GPTQ_INT4_SFT`` and ``INT4_ZP_SFT`` are converted once),
    and the backward pass reads the same bytes as the forward pass.
    """
