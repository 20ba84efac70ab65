"""The wrappers of layers for inference: one per kind of weights."""

from __future__ import annotations

from ..layers.gguf import GgufWeights
from ..layers.native import NativeWeights
from ..layers.quantized import QuantizedWeights
from .base import BaseMoEWrapper

__all__ = ["AMXMoEWrapper", "GeneralMoEWrapper", "LlamafileMoEWrapper", "NativeMoEWrapper"]


class AMXMoEWrapper(QuantizedWeights, BaseMoEWrapper):
    """Experts computed in integers: methods ``AMXINT8`` and ``AMXINT4``.

    Weights are int8 or two-level int4 codes, activations become int8 codes token by token.
    """


class GeneralMoEWrapper(QuantizedWeights, BaseMoEWrapper):
    """Experts computed in bf16 from quantized weights: methods ``MOE_INT8`` and ``MOE_INT4``.

    With ``activation_dtype="int8"`` activations become int8 codes, in blocks with a scale each.

    The files are those of ``AMXINT8`` and ``AMXINT4``; ``MOE_INT8`` also has a finer one, with a scale for
    every 32 columns.
    """


class LlamafileMoEWrapper(GgufWeights, BaseMoEWrapper):
    """Experts computed from GGUF: method ``LLAMAFILE``.

    Gate, up and down each have their own tensor type, as in mixed quantizations. Weights are never copied:
    arrays stay the caller's, files stay mapped.
    """


class NativeMoEWrapper(NativeWeights, BaseMoEWrapper):
    """Experts computed from a checkpoint's own encoding: methods ``BF16``, ``FP8`` and others.

    Weights are never copied: arrays stay the caller's, files stay mapped. Those of ``GPTQ_INT4`` and
    ``INT4_ZP``, whose rows are not contiguous, are converted once.
    """
