"""Layers whose weights are blocks of GGUF."""

from __future__ import annotations

from ..layers.gguf import GgufWeights
from .base import BaseMoEWrapper

__all__ = ["LlamafileMoEWrapper"]


class LlamafileMoEWrapper(GgufWeights, BaseMoEWrapper):
    """Experts computed from GGUF: method ``LLAMAFILE``.

    Gate, up and down each have a tensor type of their own, as mixtures of quantisations do. Weights are
    referred to, never copied: arrays stay the caller's, files stay mapped.
    """
