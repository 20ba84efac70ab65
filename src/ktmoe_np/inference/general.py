"""Layers of quantised experts whose activations stay bf16."""

from __future__ import annotations

from ..layers.quantized import QuantizedWeights
from .base import BaseMoEWrapper

__all__ = ["GeneralMoEWrapper"]


class GeneralMoEWrapper(QuantizedWeights, BaseMoEWrapper):
    """Experts computed in bf16 from quantised weights: methods ``MOE_INT8`` and ``MOE_INT4``.

    The files are those of ``AMXINT8`` and ``AMXINT4``; ``MOE_INT8`` also has a finer one, with a scale for
    every 32 columns.
    """
