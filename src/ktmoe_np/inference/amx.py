"""Layers of quantised experts with integer products."""

from __future__ import annotations

from ..layers.quantized import QuantizedWeights
from .base import BaseMoEWrapper

__all__ = ["AMXMoEWrapper"]


class AMXMoEWrapper(QuantizedWeights, BaseMoEWrapper):
    """Experts computed in integers: methods ``AMXINT8`` and ``AMXINT4``.

    Weights are int8 or two-level int4 codes, activations become int8 codes token by token.
    """
